"""The experts' feed-forward layer: dispatch, SwiGLU experts and weighted combine as one op."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.expert_ffn import live_blocks
from kernels_pallas.grouped_matmul import grouped_matmul

IMPLEMENTATIONS = ("live_blocks", "grouped_matmul")


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
      `live_blocks` on CPU, `grouped_matmul` elsewhere.

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
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
  args = x, gate_up, down, weights, order, inverse, group_sizes
  if implementation is None:
    return lax.platform_dependent(*args, cpu=_live_blocks, default=_three_passes)
  return (_live_blocks if implementation == "live_blocks" else _three_passes)(*args)


_live_blocks = jax.custom_vjp(live_blocks.forward)


def _live_blocks_fwd(*args):
  out, hidden = live_blocks.forward_keeping(*args)
  return out, (*args, hidden)


def _live_blocks_bwd(residuals, grad):
  return (*live_blocks.backward(*residuals, grad), None, None, None)


_live_blocks.defvjp(_live_blocks_fwd, _live_blocks_bwd)


def _three_passes(x, gate_up, down, weights, order, inverse, group_sizes):
  """Dispatch, two grouped matmuls, combine: the form for accelerators."""
  k, width = weights.shape[1], down.shape[1]
  rows = dispatch(x, order, inverse, k)
  hidden = grouped_matmul(rows, gate_up, group_sizes)
  hidden = jax.nn.silu(hidden[:, :width].astype(jnp.float32)) * hidden[:, width:]
  out = grouped_matmul(hidden.astype(x.dtype), down, group_sizes)
  return combine(out, weights, order, inverse).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> jax.Array:
  """[T, D] -> [R, D] in expert order (padding is zero), without a k-fold copy of x in between.

  The derivative is a gather and a sum over slots, since a scatter-add is slow everywhere.
  """
  del inverse
  return x.at[order // k].get(mode="fill", fill_value=0)


def _dispatch_fwd(x, order, inverse, k):
  return dispatch(x, order, inverse, k), inverse


def _dispatch_bwd(k, inverse, grad):
  rows = grad.at[inverse].get(mode="fill", fill_value=0).reshape(-1, k, grad.shape[-1])
  return rows.sum(1, dtype=jnp.float32).astype(grad.dtype), None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _unsort(rows, order, inverse):
  del order
  return rows.at[inverse].get(mode="fill", fill_value=0)


_unsort.defvjp(
  lambda rows, order, inverse: (_unsort(rows, order, inverse), order),
  lambda order, grad: (grad.at[order].get(mode="fill", fill_value=0), None, None),
)


def combine(rows: jax.Array, weights: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """[R, D] in expert order, weights [T, k] -> their weighted sum, float32[T, D]."""
  slots = _unsort(rows, order, inverse).reshape(*weights.shape, -1)
  return jnp.einsum("tkd,tk->td", slots, weights, preferred_element_type=jnp.float32)
