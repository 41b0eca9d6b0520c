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

  Dropless: every slot is computed, however skewed the groups are. For the backward pass the
  arguments and the hidden activations [T * k, 2F] are kept.

  Args:
    x: [T, D].
    gate_up: [E, D, 2F], gate before up.
    down: [E, F, D].
    weights: float32[T, k].
    order: int32[T * k]. Slots (token * k + j) sorted by expert.
    inverse: int32[T * k], the inverse permutation.
    group_sizes: int32[E], slots per expert; they add up to T * k.
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
  if order.shape != (weights.size,) or inverse.shape != order.shape:
    raise ValueError(f"expected order and inverse [{weights.size}], got {order.shape}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
  return _expert_ffn(implementation, x, gate_up, down, weights, order, inverse, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(implementation, *args):
  return _choose(implementation, live_blocks.forward, _three_passes, *args)


def _forward(implementation, *args):
  out, hidden = _choose(implementation, live_blocks.forward_keeping, _three_passes_keeping, *args)
  return out, (*args, hidden)


def _backward(implementation, residuals, grad):
  grads = _choose(implementation, live_blocks.backward, _three_passes_vjp, *residuals, grad)
  return (*grads, None, None, None)


_expert_ffn.defvjp(_forward, _backward)


def _choose(implementation, on_cpu, elsewhere, *args):
  if implementation is None:
    return lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)
  return (on_cpu if implementation == "live_blocks" else elsewhere)(*args)


def _three_passes(x, gate_up, down, weights, order, inverse, group_sizes):
  """Dispatch, two grouped matmuls, combine: the form for accelerators."""
  plan = order, inverse, group_sizes
  return _leave(_enter(x, gate_up, plan, weights.shape[1]), down, weights, plan, x.dtype)


def _enter(x, gate_up, plan, k):
  order, inverse, group_sizes = plan
  return grouped_matmul(dispatch(x, order, inverse, k), gate_up, group_sizes)


def _leave(hidden, down, weights, plan, dtype):
  order, inverse, group_sizes = plan
  gate, up = jnp.split(hidden, 2, axis=1)
  act = jax.nn.silu(gate.astype(jnp.float32)) * up
  out = grouped_matmul(act.astype(dtype), down, group_sizes)
  return combine(out, weights, order, inverse).astype(dtype)


def _three_passes_keeping(x, gate_up, down, weights, order, inverse, group_sizes):
  plan = order, inverse, group_sizes
  hidden = _enter(x, gate_up, plan, weights.shape[1])
  room = live_blocks.kept_rows(order.shape[0], down.shape[0]) - order.shape[0]
  kept = jnp.pad(hidden, ((0, room), (0, 0)))
  return _leave(hidden, down, weights, plan, x.dtype), kept


def _three_passes_vjp(x, gate_up, down, weights, order, inverse, group_sizes, hidden, grad):
  # The primal results of the two halves are not used, so that XLA leaves out what only they need:
  # of the forward pass, just the down projection is computed again.
  plan = order, inverse, group_sizes
  hidden = hidden[: order.shape[0]]
  leave = jax.vjp(lambda *args: _leave(*args, plan, x.dtype), hidden, down, weights)[1]
  dhidden, ddown, dweights = leave(grad)
  enter = jax.vjp(lambda *args: _enter(*args, plan, weights.shape[1]), x, gate_up)[1]
  return (*enter(dhidden), ddown, dweights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> jax.Array:
  """[T, D] -> [T * k, D] in expert order, without a k-fold copy of x in between.

  The derivative is a gather and a sum over slots, since a scatter-add is slow everywhere.
  """
  del inverse
  return x[order // k]


def _dispatch_fwd(x, order, inverse, k):
  return x[order // k], inverse


def _dispatch_bwd(k, inverse, grad):
  rows = grad[inverse].reshape(-1, k, grad.shape[-1])
  return rows.sum(1, dtype=jnp.float32).astype(grad.dtype), None, None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _unsort(rows, order, inverse):
  del order
  return rows[inverse]


_unsort.defvjp(
  lambda rows, order, inverse: (rows[inverse], order),
  lambda order, grad: (grad[order], None, None),
)


def combine(rows: jax.Array, weights: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
  """[T * k, D] in expert order, weights [T, k] -> their weighted sum, float32[T, D]."""
  slots = _unsort(rows, order, inverse).reshape(*weights.shape, -1)
  return jnp.einsum("tkd,tk->td", slots, weights, preferred_element_type=jnp.float32)
