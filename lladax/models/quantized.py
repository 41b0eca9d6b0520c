"""A model's experts in eight bits, for decoding; all other weights stay as they are.

A block's step of LLaDA-MoE-7B-A1B reads the weights of nearly all experts, 12.9 GB of the 14.1 GB that
it reads in bfloat16, and little else takes time: half the bytes are nearly twice the speed. Scales
are one per expert and output channel (`kernels_pallas.fused_moe.quantize`), taken from the weights
alone. What it does to logits: `python -m experiments.quantize_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kernels_pallas.fused_moe import quantize
from lladax.models.config import ModelConfig

WEIGHTS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def quantize_params(params, config: ModelConfig, dtype: str):
  """Parameters with `QuantizedExperts` in place of each routed layer's gate_up and down.

  For inference: `MoELayer` takes either. On a mesh values lie as the weights did.

  Args:
    params: of `config`, layers stacked or not.
    config: of the model.
    dtype: "int8" or "fp8" (float8_e4m3fn).

  Raises:
    ValueError: for another dtype, or a model without experts.
  """
  if dtype not in WEIGHTS:
    raise ValueError(f"weights in eight bits are one of {', '.join(WEIGHTS)}; got {dtype!r}")
  if config.moe is None:
    raise ValueError("this model is dense: only experts' weights are quantised, and it has none")
  return _quantized(params, jnp.dtype(WEIGHTS[dtype]))


def _quantized(tree, dtype):
  if not isinstance(tree, Mapping):
    return tree
  tree = {name: _quantized(branch, dtype) for name, branch in tree.items()}
  if {"gate_up", "down"} <= tree.keys():
    gate_up, down = tree["gate_up"], tree["down"]
    one = quantize if gate_up.ndim == 3 else _stack
    tree["gate_up"], tree["down"] = one(gate_up, down, dtype)
  return tree


def _stack(gate_up, down, dtype):
  """Layer by layer: in float32 all of them together need several times their memory."""
  return jax.lax.map(lambda pair: quantize(*pair, dtype), (gate_up, down))
