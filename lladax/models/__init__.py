"""The transformer family: configs and presets, layers, attention and its masks."""

from lladax.models.attention import AttentionMask, block_causal, full, padding, segments
from lladax.models.cache import Memory
from lladax.models.config import ModelConfig, ParameterCount, count_parameters
from lladax.models.denoiser import Denoiser
from lladax.models.inference import for_inference, inference_config
from lladax.models.presets import (
  PROXIES,
  QWEN2_5,
  dream_7b,
  llada2_flash,
  llada2_mini,
  llada_8b,
  llada_moe_7b_a1b,
  proxy,
  proxy_25m,
  qwen2_5,
  tiny,
)
from lladax.models.quantized import quantize_params
from lladax.models.transformer import (
  Transformer,
  abstract_params,
  bind_token_nll,
  count_load,
  init_params,
  init_variables,
)

__all__ = [
  "PROXIES",
  "QWEN2_5",
  "AttentionMask",
  "Denoiser",
  "Memory",
  "ModelConfig",
  "ParameterCount",
  "Transformer",
  "abstract_params",
  "bind_token_nll",
  "block_causal",
  "count_load",
  "count_parameters",
  "dream_7b",
  "for_inference",
  "full",
  "inference_config",
  "init_params",
  "init_variables",
  "llada2_flash",
  "llada2_mini",
  "llada_8b",
  "llada_moe_7b_a1b",
  "padding",
  "proxy",
  "proxy_25m",
  "quantize_params",
  "qwen2_5",
  "segments",
  "tiny",
]
