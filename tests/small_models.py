"""Models with random weights for tests of what is around a network: text in, text out."""

import dataclasses

import lladax
from lladax.data import train_bpe
from lladax.models import llada_moe_7b_a1b, tiny
from lladax.moe import MoEConfig

FIELDS = {
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "moe": MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=8),
  "initializer_range": 0.3,  # far from uniform, so that answers differ
}


def ids_of(tokenizer) -> dict[str, int]:
  return {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "pad")}


def small_config(tokenizer, *, context: int):
  """A LLaDA-MoE of some thousand parameters."""
  return tiny(
    vocab_size=tokenizer.vocab_size,
    max_position_embeddings=context,
    **FIELDS,
    **ids_of(tokenizer),
  )


def small_model(tokenizer, *, context: int, **attributes) -> lladax.Model:
  model = lladax.init(small_config(tokenizer, context=context), seed=1, tokenizer=tokenizer)
  return dataclasses.replace(model, **attributes)


def save_chatty(folder):
  """A folder in the published layout: LLaDA-MoE with a tokenizer that has turns."""
  tokenizer = train_bpe(["a man, a plan, a canal: panama " * 40], 280)
  tokenizer.engine.add_special_tokens(["<role>", "</role>", "<|role_end|>"])
  config = dataclasses.replace(
    llada_moe_7b_a1b(),
    vocab_size=304,
    head_dim=8,
    max_position_embeddings=128,
    dtype="float32",
    **FIELDS,
    **ids_of(tokenizer),
  )
  lladax.init(config, seed=3, tokenizer=tokenizer).save(folder)
  return folder
