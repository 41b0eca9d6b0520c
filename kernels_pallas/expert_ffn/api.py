"""The experts' feed-forward layer: dispatch, SwiGLU experts and weighted combine as one op."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import op
from kernels_pallas.expert_ffn import live_blocks
from kernels_pallas.grouped_matmul import IMPLEMENTATIONS as PRODUCTS
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.permute import collect, dispatch

IMPLEMENTATIONS = ("live_blocks", "grouped_matmul")
# How rows move beside products of a named implementation; beside others as the platform has it.
ROWS = {"pallas_tpu": "pallas_tpu", "mosaic_gpu": "pallas_gpu", "triton": "pallas_gpu"}


def expert_ffn(
  x: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
  weights: jax.Array,
  order: jax.Array,
  inverse: jax.Array,
  group_sizes: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """y_t = sum_j weights_tj * down_j(silu(gate_j x_t) * up_j x_t) over the token's k experts.

  Every slot of `order` is computed, however skewed the groups are. For the backward pass each
  implementation keeps what suits it; wrap the layer in `jax.checkpoint` to keep the arguments only.

  Args:
    x: [T, D].
    gate_up: [E, D, 2F], gate before up.
    down: [E, F, D].
    weights: float32[T, k].
    order: int32[R]. Slots (token * k + j) sorted by expert; from T * k on: padding, which follows
      the last group.
    inverse: int32[T * k], the place of each slot in `order`; from R on: its expert is elsewhere
      (on another device), and it adds nothing here.
    group_sizes: int32[E], slots per expert; they add up to at most R.
    implementation: one of `IMPLEMENTATIONS`; None chooses by the platform that is lowered for:
      `live_blocks` on CPU, `grouped_matmul` elsewhere, with what that chooses. Any implementation
      of the grouped matmul may be named instead, such as "ragged_dot", to compare with.

  Returns:
    [T, D] in the dtype of `x`; the combine is summed in float32.

  Raises:
    ValueError: for shapes that do not fit or an unknown implementation.
  """
  experts, width = gate_up.shape[0], down.shape[1]
  fits = gate_up.shape == (experts, x.shape[1], 2 * width)
  if not fits or down.shape != (experts, width, x.shape[1]):
    raise ValueError(
      f"expected gate_up [E, D, 2F] and down [E, F, D] for x {x.shape}, "
      f"got {gate_up.shape} and {down.shape}"
    )
  if order.ndim != 1 or inverse.shape != (weights.size,):
    raise ValueError(
      f"expected order [R] and inverse [{weights.size}], got {order.shape} and {inverse.shape}"
    )
  names = tuple(dict.fromkeys([*IMPLEMENTATIONS, *PRODUCTS]))
  if implementation not in (None, *names):
    raise ValueError(f"unknown implementation {implementation!r}; one of {names}")
  args = x, gate_up, down, weights, order, inverse, group_sizes
  if implementation == "live_blocks":
    return _live_blocks(*args)
  # Chosen before there is anything to differentiate: branches of one choice would all carry what
  # any of them keeps for the backward pass.
  if implementation is None and op.target_platform() == "cpu":
    return op.by_platform(*args, cpu=_live_blocks, tpu=_passes, cuda=_passes)
  return _passes(*args, None if implementation == "grouped_matmul" else implementation)


_live_blocks = jax.custom_vjp(live_blocks.forward)


def _live_blocks_fwd(*args):
  out, hidden = live_blocks.forward_keeping(*args)
  return out, (*args, hidden)


def _live_blocks_bwd(residuals, grad):
  return (*live_blocks.backward(*residuals, grad), None, None, None)


_live_blocks.defvjp(_live_blocks_fwd, _live_blocks_bwd)


def _passes(x, gate_up, down, weights, order, inverse, group_sizes, products=None):
  """Dispatch, SwiGLU, down-projection, sum over slots: the form for accelerators.

  The slot's weight multiplies the hidden activations instead of the output, which is the same sum:
  the backward pass then needs no output, and where activations are computed again the
  down-projection is not.
  """
  k = weights.shape[1]
  moved = dict(implementation=ROWS.get(products))
  made = dict(implementation=products, by_row=True)
  # [R, 1] and [R, D]; a row of one number is for XLA to gather.
  scale = dispatch(weights.reshape(-1, 1).astype(jnp.float32), order, inverse, 1)
  rows = dispatch(x, order, inverse, k, **moved)
  hidden = grouped_swiglu(rows, gate_up, group_sizes, **made)  # [R, F]
  hidden = (hidden.astype(jnp.float32) * scale).astype(x.dtype)
  out = grouped_matmul(hidden, down, group_sizes, **made)  # [R, D]
  return collect(out, order, inverse, k, **moved)
