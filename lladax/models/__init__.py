"""The transformer family: configs and presets, layers, attention and its masks."""

from lladax.models.attention import AttentionMask, block_causal, full, padding, segments
from lladax.models.config import (
  PROXIES,
  ModelConfig,
  ParameterCount,
  count_parameters,
  llada_8b,
  llada_moe_7b_a1b,
  proxy,
  proxy_25m,
  tiny,
)
from lladax.models.transformer import (
  Denoiser,
  Transformer,
  abstract_params,
  bind_token_nll,
  init_params,
  init_variables,
)

__all__ = [
  "PROXIES",
  "AttentionMask",
  "Denoiser",
  "ModelConfig",
  "ParameterCount",
  "Transformer",
  "abstract_params",
  "bind_token_nll",
  "block_causal",
  "count_parameters",
  "full",
  "init_params",
  "init_variables",
  "llada_8b",
  "llada_moe_7b_a1b",
  "padding",
  "proxy",
  "proxy_25m",
  "segments",
  "tiny",
]
