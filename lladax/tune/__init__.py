"""Fine-tuning: conversations to batches."""

from lladax.tune.packing import Packing, best_fit
from lladax.tune.sft import ConversationConfig, ConversationData
from lladax.tune.turns import Turns, encode_turns

__all__ = [
  "ConversationConfig",
  "ConversationData",
  "Packing",
  "Turns",
  "best_fit",
  "encode_turns",
]
