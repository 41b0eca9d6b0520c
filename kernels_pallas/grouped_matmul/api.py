"""Grouped matmul: signature, checks, derivative, and which implementation runs where."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul import live_blocks, reference

IMPLEMENTATIONS = ("live_blocks", "ragged_dot", "reference")


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies each row of `lhs` by the matrix of its group; differentiable in `lhs` and `rhs`.

  Args:
    lhs: [T, D], rows sorted by group.
    rhs: [E, D, F].
    group_sizes: int32[E]. Rows beyond their sum belong to no group.
    implementation: one of `IMPLEMENTATIONS`; None chooses by the platform that is lowered for:
      `live_blocks` on CPU, where XLA expands `lax.ragged_dot` to E dense products, and
      `ragged_dot` elsewhere.

  Returns:
    [T, F] in the dtype of `lhs`, accumulated in float32; zero in rows that belong to no group.

  Raises:
    ValueError: for shapes that do not fit or an unknown implementation.
  """
  if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
    raise ValueError(f"expected lhs [T, D] and rhs [E, D, F], got {lhs.shape} and {rhs.shape}")
  if group_sizes.shape != rhs.shape[:1]:
    raise ValueError(f"expected group_sizes [{rhs.shape[0]}], got {group_sizes.shape}")
  if implementation == "reference":
    return reference.grouped_matmul(lhs, rhs, group_sizes)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
  return _grouped_matmul(implementation, lhs, rhs, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(implementation, lhs, rhs, group_sizes):
  return _choose(implementation, live_blocks.forward, _ragged_dot, lhs, rhs, group_sizes)


def _forward(implementation, lhs, rhs, group_sizes):
  return _grouped_matmul(implementation, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(implementation, residuals, grad):
  return (*_choose(implementation, _live_vjp, _ragged_dot_vjp, *residuals, grad), None)


_grouped_matmul.defvjp(_forward, _backward)


def _choose(implementation, on_cpu, elsewhere, *args):
  if implementation is None:
    return lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)
  return (on_cpu if implementation == "live_blocks" else elsewhere)(*args)


def _live_vjp(lhs, rhs, group_sizes, grad):
  return (
    live_blocks.gradient_lhs(grad, rhs, group_sizes).astype(lhs.dtype),
    live_blocks.gradient_rhs(lhs, grad, group_sizes, rhs.dtype),
  )


def _ragged_dot(lhs, rhs, group_sizes):
  out = lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)
  # Some back ends leave the rows beyond the last group unwritten.
  live = jnp.arange(lhs.shape[0]) < group_sizes.sum()
  return jnp.where(live[:, None], out, 0).astype(lhs.dtype)


def _ragged_dot_vjp(lhs, rhs, group_sizes, grad):
  live = (jnp.arange(lhs.shape[0]) < group_sizes.sum())[:, None]
  lhs, grad = jnp.where(live, lhs, 0), jnp.where(live, grad, 0)
  return jax.vjp(lambda a, b: _ragged_dot(a, b, group_sizes), lhs, rhs)[1](grad)
