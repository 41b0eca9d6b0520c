"""One device's share of the layer: its experts on the rows at hand, by one of two ops.

`kernels_pallas.expert_ffn` is for many tokens and has a derivative. `kernels_pallas.fused_moe` is for
the few of a decoding step: it reads each expert that some token chose once, takes weights in eight
bits, and a token's result does not depend on the other tokens.
"""

from __future__ import annotations

import jax

from kernels_pallas.expert_ffn import expert_ffn
from kernels_pallas.fused_moe import QuantizedExperts, fused_moe, is_faster
from kernels_pallas.fused_moe.quantize import Weights
from kernels_pallas.op import vary_like
from lladax.moe.dispatch import Plan, make_plan

FUSED, INFERENCE = "fused_moe", "inference"


def compute_own(
  x: jax.Array,
  weights: jax.Array,
  experts: jax.Array,
  gate_up: Weights,
  down: Weights,
  implementation: str | None,
  *,
  devices: int = 1,
) -> jax.Array:
  """The share of y [T, D] of E experts, with room for all of their slots.

  Args:
    x: [T, D].
    weights: float32[T, k].
    experts: int32[T, k], counted among these; outside [0, E): elsewhere.
    gate_up: [E, D, 2F].
    down: [E, F, D].
    implementation: of `MoEConfig`.
    devices: over which the k experts of a token are spread.
  """
  if takes_fused(implementation, x, weights, down, devices=devices):
    return _fused(x, weights, experts, gate_up, down)
  plan = make_plan(experts, down.shape[0])
  return _ffn(x, weights, gate_up, down, plan, implementation)


def compute_planned(
  x: jax.Array,
  weights: jax.Array,
  gate_up: Weights,
  down: Weights,
  plan: Plan,
  implementation: str | None,
  *,
  devices: int = 1,
) -> jax.Array:
  """`compute_own` for the slots that a plan has room for."""
  if takes_fused(implementation, x, weights, down, devices=devices):
    return _fused(x, weights, plan.experts.reshape(weights.shape), gate_up, down)
  return _ffn(x, weights, gate_up, down, plan, implementation)


def takes_fused(
  implementation: str | None,
  x: jax.Array,
  weights: jax.Array,
  down: Weights,
  *,
  devices: int = 1,
) -> bool:
  """Whether `fused_moe` computes x [T, D]: where it is named, or faster and nothing is trained."""
  if implementation == INFERENCE:
    return is_faster(*weights.shape, down, x.dtype, devices=devices)
  return implementation == FUSED


def _fused(x, weights, experts, gate_up, down):
  operands = x, gate_up, down, weights, experts
  return fused_moe(*vary_like(operands, *operands))


def _ffn(x, weights, gate_up, down, plan: Plan, implementation):
  gate_up, down = (
    w.dequantize(x.dtype) if isinstance(w, QuantizedExperts) else w for w in (gate_up, down)
  )
  x, gate_up, down, weights = vary_like((x, gate_up, down, weights), x, gate_up, down, weights)
  slots = plan.order, plan.inverse, plan.group_sizes
  implementation = None if implementation == INFERENCE else implementation
  return expert_ffn(x, gate_up, down, weights, *slots, implementation=implementation)
