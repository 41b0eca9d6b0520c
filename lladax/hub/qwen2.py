"""Qwen2.5 (arXiv 2412.15115), the autoregressive baseline, and Dream-7B, made from it."""

from __future__ import annotations

import dataclasses

from lladax.hub.family import (
  Family,
  check_attention,
  check_computed,
  check_whole_heads,
  given,
  need,
  usual_fields,
  usual_keys,
)
from lladax.hub.names import Names
from lladax.models import ModelConfig

COMPUTED = {
  "hidden_act": ("silu",),
  "attention_dropout": (0,),
  "attention_bias": (True,),  # the published code has these biases whatever a config says
  "use_mrope": (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2(Family):
  """Both predict token i from the hidden state at i - 1 (Dream: arXiv 2508.15487).

  Attributes:
    causal: Qwen2 attends backwards, Dream both ways.
  """

  causal: bool

  def model_config(self, config, *, ids, dtype) -> ModelConfig:
    check_computed(config, COMPUTED)
    check_attention(config)
    check_whole_heads(config)
    return ModelConfig(
      num_key_value_heads=given(config, "num_key_value_heads", None),
      head_dim=given(config, "head_dim", None),
      intermediate_size=need(config, "intermediate_size"),
      qk_norm=False,
      attention_bias=True,
      causal=self.causal,
      shift=True,
      **usual_fields(config, ids, dtype),
    )

  def hf_config(self, config) -> dict:
    if config.intermediate_size is None:
      raise ValueError("intermediate_size=None")
    shared = {
      **usual_keys(config),
      "architectures": [self.architectures[0]],
      "intermediate_size": config.intermediate_size,
      "max_window_layers": config.num_hidden_layers,
      "model_type": self.model_types[0],
      "use_cache": self.causal,
      "use_sliding_window": False,
    }
    if config.head_dim is not None:
      shared["head_dim"] = config.head_dim
    if config.mask_token_id is not None:
      shared["mask_token_id"] = config.mask_token_id
    return shared


DREAM = Qwen2(
  name="dream",
  architectures=("DreamModel",),
  model_types=("Dream", "dream"),
  marker="hidden_size",
  published_ids={"mask_token_id": 151_666, "eos_token_id": 151_643, "pad_token_id": 151_643},
  chat_template="chatml",
  names=Names(),
  causal=False,
)

QWEN2 = Qwen2(
  name="qwen2",
  architectures=("Qwen2ForCausalLM",),
  model_types=("qwen2",),
  marker="hidden_size",
  # <|im_end|> ends the turns of the Instruct models.
  published_ids={"eos_token_id": 151_645, "pad_token_id": 151_643},
  chat_template="chatml",
  names=Names(),
  causal=True,
)
