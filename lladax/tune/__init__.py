"""Fine-tuning: conversations to batches, and adapters."""

from lladax.tune.lora import (
  Adapted,
  LoraConfig,
  attach,
  init_adapters,
  load_adapters,
  make_lora_step,
  merge,
  save_adapters,
)
from lladax.tune.packing import Packing, best_fit
from lladax.tune.sft import ConversationConfig, ConversationData
from lladax.tune.turns import Turns, encode_turns

__all__ = [
  "Adapted",
  "ConversationConfig",
  "ConversationData",
  "LoraConfig",
  "Packing",
  "Turns",
  "attach",
  "best_fit",
  "encode_turns",
  "init_adapters",
  "load_adapters",
  "make_lora_step",
  "merge",
  "save_adapters",
]
