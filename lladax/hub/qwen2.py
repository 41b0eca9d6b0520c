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
  rope_theta,
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
      vocab_size=need(config, "vocab_size"),
      hidden_size=need(config, "hidden_size"),
      num_hidden_layers=need(config, "num_hidden_layers"),
      num_attention_heads=need(config, "num_attention_heads"),
      num_key_value_heads=given(config, "num_key_value_heads", None),
      head_dim=given(config, "head_dim", None),
      intermediate_size=need(config, "intermediate_size"),
      max_position_embeddings=need(config, "max_position_embeddings"),
      rope_theta=rope_theta(config),
      rms_norm_eps=need(config, "rms_norm_eps", float),
      qk_norm=False,
      attention_bias=True,
      causal=self.causal,
      shift=True,
      tie_word_embeddings=given(config, "tie_word_embeddings", False, bool),
      initializer_range=given(config, "initializer_range", 0.02, float),
      dtype=dtype,
      param_dtype=dtype,
      **{"mask_token_id": None, **ids},
    )

  def hf_config(self, config) -> dict:
    if config.intermediate_size is None:
      raise ValueError("intermediate_size=None")
    shared = {
      "architectures": [self.architectures[0]],
      "attention_dropout": 0.0,
      "eos_token_id": config.eos_token_id,
      "hidden_act": "silu",
      "hidden_size": config.hidden_size,
      "initializer_range": config.initializer_range,
      "intermediate_size": config.intermediate_size,
      "max_position_embeddings": config.max_position_embeddings,
      "max_window_layers": config.num_hidden_layers,
      "model_type": self.model_types[0],
      "num_attention_heads": config.num_attention_heads,
      "num_hidden_layers": config.num_hidden_layers,
      "num_key_value_heads": config.kv_heads,
      "pad_token_id": config.pad_token_id,
      "rms_norm_eps": config.rms_norm_eps,
      "rope_scaling": None,
      "rope_theta": config.rope_theta,
      "tie_word_embeddings": config.tie_word_embeddings,
      "torch_dtype": config.param_dtype,
      "use_cache": self.causal,
      "use_sliding_window": False,
      "vocab_size": config.vocab_size,
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
