"""Grouped matmul for CPUs: a loop over live row blocks, forward and both gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import cpu
from kernels_pallas.op import vary_like


def forward(lhs, rhs, group_sizes, *, transpose_rhs=False, tiling=None) -> jax.Array:
  """[R, D] x [E, D, F] -> [R, F] (transposed: [R, F] x [E, D, F] -> [R, D]), zero beyond the groups."""
  del tiling

  def enter(group):
    # Transposed once per group: products with the transposed matrix on the right are slower.
    return cpu.transposed(rhs[group]) if transpose_rhs else rhs[group]

  width = rhs.shape[1 if transpose_rhs else 2]
  (out,) = _rows(lhs, rhs, group_sizes, enter, lambda product: [product], [width])
  return out


def swiglu(lhs, gate_up, group_sizes, *, keep: bool, tiling=None):
  """[R, D] x [E, D, 2F] -> silu(gate) * up [R, F]; with `keep` also both before it, [R, 2F]."""
  del tiling
  width = gate_up.shape[2] // 2

  def finish(pre):
    act = jax.nn.silu(pre[:, :width]) * pre[:, width:]
    return [act, pre] if keep else [act]

  widths = [width, 2 * width] if keep else [width]
  out = _rows(lhs, gate_up, group_sizes, lambda group: gate_up[group], finish, widths)
  return tuple(out) if keep else out[0]


def _rows(lhs, rhs, group_sizes, enter, finish, widths):
  """finish(rows x enter(group)), float32[block, width] each, put together to [R, width] each."""
  rows, groups = lhs.shape[0], rhs.shape[0]
  block = cpu.block_rows(rows, groups)
  padded = jnp.pad(lhs, ((0, block), (0, 0)))

  def body(start, live, outs, weight):
    results = finish(cpu.dot(cpu.take_rows(padded, start, block), weight))
    # Rows beyond the groups stay zero.
    outs = [
      cpu.put_rows(out, jnp.where(live[:, None], result, 0), start)
      for out, result in zip(outs, results, strict=True)
    ]
    return outs, weight

  carry = [jnp.zeros((rows + block, width), lhs.dtype) for width in widths]
  outs = cpu.for_each_block(
    group_sizes,
    block,
    enter=enter,
    body=body,
    leave=lambda group, outs, weight: outs,
    carry=vary_like(carry, lhs, rhs, group_sizes),
  )
  return [out[:rows] for out in outs]


def gradient_rhs(lhs, grad, group_sizes, *, dtype, tiling=None) -> jax.Array:
  """[R, D], [R, F] -> [E, D, F], accumulated in float32."""
  del tiling
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
