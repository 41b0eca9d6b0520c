"""The experts' layer for a few tokens, the meaning: dense and one-hot, in float32 throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.expert_ffn import reference
from kernels_pallas.fused_moe.quantize import Weights, dequantized


def forward(
  x: jax.Array, gate_up: Weights, down: Weights, weights: jax.Array, experts: jax.Array
) -> jax.Array:
  """`expert_ffn`'s dense reference on the weights that quantised ones stand for.

  Args and returns: see `kernels_pallas.fused_moe.api.fused_moe`. Unlike every other implementation
  it reads all experts, so weights of inactive ones must be finite.
  """
  gate_up, down = dequantized(gate_up), dequantized(down)
  out = reference.expert_ffn(x.astype(jnp.float32), gate_up, down, weights, experts)
  return out.astype(x.dtype)
