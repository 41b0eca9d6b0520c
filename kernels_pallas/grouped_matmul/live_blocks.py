"""Grouped matmul for CPUs: a loop over live row blocks, forward and both gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import cpu
from kernels_pallas.op import vary_like


def forward(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """[T, D] x [E, D, F] -> [T, F], zero in rows that belong to no group."""
  rows, groups = lhs.shape[0], rhs.shape[0]
  block = cpu.block_rows(rows, groups)
  padded = jnp.pad(lhs, ((0, block), (0, 0)))

  def body(start, live, out, weight):
    product = cpu.dot(cpu.take_rows(padded, start, block), weight)
    return cpu.put_rows(out, jnp.where(live[:, None], product, 0), start), weight

  out = cpu.for_each_block(
    group_sizes,
    block,
    enter=lambda group: rhs[group],
    body=body,
    leave=lambda group, out, weight: out,
    carry=vary_like(jnp.zeros((rows + block, rhs.shape[2]), lhs.dtype), lhs, rhs, group_sizes),
  )
  return out[:rows]


def gradient_lhs(grad: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  return forward(grad, jnp.swapaxes(rhs, 1, 2), group_sizes)


def gradient_rhs(lhs: jax.Array, grad: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
  """[T, D], [T, F] -> [E, D, F], accumulated in float32."""
  rows, groups = lhs.shape[0], group_sizes.shape[0]
  block = cpu.block_rows(rows, groups)
  lhs, grad = (jnp.pad(x, ((0, block), (0, 0))) for x in (lhs, grad))
  shape, refs = (lhs.shape[1], grad.shape[1]), (lhs, grad, group_sizes)

  def body(start, live, out, total):
    # Both factors are cut: a poisoned row beyond the group must not leak through 0 * inf.
    a = jnp.where(live[:, None], cpu.take_rows(lhs, start, block), 0)
    b = jnp.where(live[:, None], cpu.take_rows(grad, start, block), 0)
    return out, total + cpu.dot(cpu.transposed(a), b)

  return cpu.for_each_block(
    group_sizes,
    block,
    enter=lambda group: vary_like(jnp.zeros(shape, jnp.float32), *refs),
    body=body,
    leave=lambda group, out, total: out.at[group].set(total.astype(dtype)),
    carry=vary_like(jnp.zeros((groups, *shape), dtype), *refs),
  )
