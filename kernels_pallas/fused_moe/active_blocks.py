"""The experts' layer for a few tokens on CPUs: a loop over active experts, in blocks of few rows.

`expert_ffn`'s live blocks visit every expert and take 32 rows at least. Time over theirs, median of
paired runs (D 1024, F 512, E 64, k 8, busy 2-core AVX-512 machine, jax 0.10.2):

  tokens         1      8     64    256
  float32     0.09   0.41   0.69   1.08
  bfloat16    0.03   0.17   0.21   0.19

Eight bits take no longer than float32 (11 to 14 ms against 15 at one token). With more tokens blocks of
few rows are what takes the time: 1.0 to 1.2 at 128 to 1024 tokens, 1.7 at 2048 (float32; the machine
busier). What counts is rows per expert: 32 at T 256 here, and with D 256, F 256, E 16, k 2 the ratio is
0.65 at 8 of them, 0.95 at 32, 1.1 at 72 and 144; 0.48 and 0.74 at 8 and 72 in bfloat16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import cpu
from kernels_pallas.fused_moe.active import find_active, sum_slots
from kernels_pallas.fused_moe.quantize import QuantizedExperts, Weights
from kernels_pallas.op import vary_like


def forward(
  x: jax.Array, gate_up: Weights, down: Weights, weights: jax.Array, experts: jax.Array
) -> jax.Array:
  """See `kernels_pallas.fused_moe.api.fused_moe`.

  Blocks have the same rows for any number of tokens: a product's rounding may depend on its shape,
  and a token's result must not depend on how many others there are.
  """
  width, block = down.shape[1], 8 if x.dtype == jnp.float32 else 16
  active = find_active(experts, down.shape[0])
  slots = jnp.pad(active.order, (0, block))
  tokens, slot_weights = slots // experts.shape[1], weights.reshape(-1).astype(jnp.float32)[slots]

  def visit(i, out):
    expert = active.experts[i]
    gate_up_e, gate_up_scale = _one(gate_up, expert, x.dtype)
    down_e, down_scale = _one(down, expert, x.dtype)

    def step(b, out):
      start = active.starts[expert] + b * block
      rows = x[cpu.take_rows(tokens, start, block)]
      hidden = cpu.dot(rows, gate_up_e) * gate_up_scale
      act = jax.nn.silu(hidden[:, :width]) * hidden[:, width:]
      scale = down_scale * cpu.take_rows(slot_weights, start, block)[:, None]
      return cpu.put_rows(out, cpu.dot(act.astype(x.dtype), down_e) * scale, start)

    return lax.fori_loop(0, (active.sizes[expert] + block - 1) // block, step, out)

  out = jnp.zeros((tokens.size, x.shape[1]), jnp.float32)
  leaves = jax.tree.leaves((x, gate_up, down, experts))
  out = lax.fori_loop(0, active.count, visit, vary_like(out, *leaves))
  return sum_slots(out, experts, active, down.shape[0]).astype(x.dtype)


def _one(weights, expert, dtype):
  """The matrix of one expert in `dtype`, and what to multiply its products by."""
  # Without the barrier XLA:CPU of jax 0.10 takes the slice of a float32 copy of all experts, made
  # before the loop, wherever the weights are of another float type.
  weights, expert = lax.optimization_barrier((weights, expert))
  if isinstance(weights, QuantizedExperts):
    return weights.values[expert].astype(dtype), weights.scales[expert]
  return weights[expert], jnp.float32(1)
