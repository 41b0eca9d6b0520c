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
  Transformer,
  abstract_params,
  init_params,
  init_variables,
)

__all__ = [
  "PROXIES",
  "AttentionMask",
  "ModelConfig",
  "ParameterCount",
  "Transformer",
  "abstract_params",
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
