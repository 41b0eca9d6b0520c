"""Grouped matmul for GPUs in Pallas's Triton dialect: forward, SwiGLU and the weight gradient.

On Hopper the weight gradient is what it is for: 551 to 580 TFLOP/s where Mosaic's reached 108 to
116 (tokamax's autotuning data, H100, 131072 rows, 128 experts). Default tiles are those that won
most often there. jax announces the end of this dialect since 0.11; 0.12 still lowers it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import gpu, op
from kernels_pallas.grouped_matmul.row_tiles import row_tiles, tile_count

FORWARD = op.Tiling(rows=128, columns=128, depth=32, stages=4, warps=4)
# Two accumulators: half the columns each.
SWIGLU = op.Tiling(rows=128, columns=64, depth=32, stages=4, warps=4)
# Of a tile of weights depth is the rows (D); rows are those that are summed in one step.
GRADIENT_RHS = op.Tiling(rows=64, columns=256, depth=128, stages=3, warps=8)


def candidates(shape: tuple[int, int, int, int], dtype) -> tuple[op.Tiling, ...]:
  """Tilings worth timing for (R, E, D, F), for all passes.

  Kept are those whose stages fit the shared memory of an Ada GPU (99 KiB) with 4 warps or a
  Hopper's (227 KiB) with 8, and whose sums fit the registers.
  """
  del shape  # tiles are cut to what the matrices need
  sides = itertools.product((32, 64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (3, 4))
  found = [
    op.Tiling(rows=rows, columns=columns, depth=depth, stages=stages, warps=warps)
    for rows, columns, depth, warps, stages in sides
    if (max(rows, depth) + columns) * min(rows, depth) * stages * jnp.dtype(dtype).itemsize
    <= {4: 99, 8: 227}[warps] << 10
    and 16 <= max(rows, depth) * columns // (32 * warps) <= 128
  ]
  return tuple(dict.fromkeys([FORWARD, SWIGLU, GRADIENT_RHS, *found]))


def forward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  transpose_rhs: bool = False,
  tiling: op.Tiling | None = None,
) -> jax.Array:
  """[R, D] x [E, D, F] -> [R, F] (transposed: [R, F] x [E, D, F] -> [R, D]), zero beyond the groups.

  Raises:
    ValueError: for arrays of more than 2**31 numbers, which 32-bit offsets cannot address.
  """
  width = rhs.shape[1 if transpose_rhs else 2]
  return _products(
    lhs,
    rhs,
    group_sizes,
    finish=lambda products: products,
    outputs=(width,),
    parts=1,
    transpose_rhs=transpose_rhs,
    tiling=tiling or FORWARD,
  )[0]


def swiglu(
  lhs: jax.Array,
  gate_up: jax.Array,
  group_sizes: jax.Array,
  *,
  keep: bool,
  tiling: op.Tiling | None = None,
):
  """[R, D] x [E, D, 2F] -> silu(gate) * up [R, F]; with `keep` also both before it, [R, 2F]."""
  width = gate_up.shape[2] // 2

  def finish(products):
    gate, up = products
    activation = (jax.nn.sigmoid(gate) * gate * up,)
    return (*activation, gate, up) if keep else activation

  outputs = (width, 2 * width, 2 * width) if keep else (width,)
  out = _products(
    lhs,
    gate_up,
    group_sizes,
    finish=finish,
    outputs=outputs,
    parts=2,
    transpose_rhs=False,
    tiling=tiling or SWIGLU,
  )
  return tuple(out) if keep else out[0]


def gradient_rhs(
  lhs: jax.Array,
  grad: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype,
  tiling: op.Tiling | None = None,
) -> jax.Array:
  """[R, D], [R, F] -> [E, D, F] in `dtype`, accumulated in float32; zero for empty groups."""
  (rows, depth), width, groups = lhs.shape, grad.shape[1], group_sizes.shape[0]
  tiling = _shrunk(tiling or GRADIENT_RHS, rows, width, depth)
  ends = jnp.cumsum(group_sizes.astype(jnp.int32))
  out = op.shape_like((groups, depth, width), dtype, lhs, grad)
  gpu.check_offsets(lhs, grad, out)
  return _call(
    functools.partial(_gradient_rhs_kernel, tiling=tiling),
    out,
    grid=(pl.cdiv(width, tiling.columns), pl.cdiv(depth, tiling.depth), groups),
    tiling=tiling,
  )(ends - group_sizes.astype(jnp.int32), ends, lhs, grad)


def _products(lhs, rhs, group_sizes, *, finish, outputs, parts, transpose_rhs, tiling):
  rows, depth = lhs.shape
  width = rhs.shape[1 if transpose_rhs else 2] // parts
  gpu.check_offsets(lhs, rhs)
  if not rows:
    return [jnp.zeros((0, size), lhs.dtype) for size in sorted(set(outputs))]
  tiling = _shrunk(tiling, rows, width, depth)
  tiles = row_tiles(group_sizes, rows, tiling.rows)
  kernel = functools.partial(
    _products_kernel,
    finish=finish,
    parts=parts,
    width=width,
    transpose_rhs=transpose_rhs,
    tiling=tiling,
  )
  return _call(
    kernel,
    [op.shape_like((rows, size), lhs.dtype, lhs, rhs) for size in sorted(set(outputs))],
    grid=(pl.cdiv(width, tiling.columns), tile_count(rhs.shape[0], rows, tiling.rows)),
    tiling=tiling,
  )(tiles.group, tiles.start, tiles.high, lhs, rhs)


def _products_kernel(
  group_ref, start_ref, high_ref, lhs, rhs, *outs, finish, parts, width, transpose_rhs, tiling
):
  """One tile of rows by one of columns: a product per part of the columns, then `finish`."""
  column, tile = pl.program_id(0), pl.program_id(1)
  group, start, high = group_ref[tile], start_ref[tile], high_ref[tile]
  experts, depth = rhs.shape[0], lhs.shape[1]
  rows = start + _iota(tiling.rows)
  # Rows of the next group, or the last row of all, stand in for those that are not stored.
  reach = jnp.minimum(rows, lhs.shape[0] - 1)[:, None]
  columns = column * tiling.columns + _iota(tiling.columns)
  inside = _mask(columns, width, tiling.columns)
  expert = jnp.minimum(group, experts - 1)
  # The rows beyond the groups have no product; nor has a tile without rows.
  live = (group < experts) & (start < high)
  # (A product: `where` of scalars is lowered with the type of its condition, in 0.10.2 and 0.12.)
  steps = live.astype(jnp.int32) * pl.cdiv(depth, tiling.depth)

  def step(i, sums):
    inner = i * tiling.depth + _iota(tiling.depth)
    known = _mask(inner, depth, tiling.depth)
    left = _load(lhs, (reach, inner[None]), None, known)
    result = []
    for part, total in enumerate(sums):
      if transpose_rhs:
        right = _load(rhs, (expert, columns[:, None], inner[None]), inside, known)
      else:
        right = _load(rhs, (expert, inner[:, None], part * width + columns[None]), known, inside)
      result.append(total + _dot(left, right, 1, 1 if transpose_rhs else 0))
    return tuple(result)

  zeros = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
  results = finish(lax.fori_loop(0, steps, step, (zeros,) * parts))
  # One result per output; of three, the last two are the halves of the second output.
  for i, result in enumerate(results):
    where = rows[:, None], width * (i == 2) + columns[None]
    _store(outs[min(i, 1)], where, result, rows < high, inside)


def _gradient_rhs_kernel(start_ref, end_ref, lhs, grad, out, *, tiling):
  """One tile of one expert's weights: whole steps over the group's rows, then the ragged one."""
  column, row, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  start, end = start_ref[group], end_ref[group]
  depth, width = out.shape[1:]
  rows = row * tiling.depth + _iota(tiling.depth)
  columns = column * tiling.columns + _iota(tiling.columns)
  known, inside = _mask(rows, depth, tiling.depth), _mask(columns, width, tiling.columns)

  def step(i, total, ragged):
    inner = start + i * tiling.rows + _iota(tiling.rows)
    # Both factors are cut: a poisoned row beyond the group must not leak through 0 * nan.
    live = inner < end if ragged else None
    inner = jnp.minimum(inner, lhs.shape[0] - 1)[:, None]
    left = _load(lhs, (inner, rows[None]), live, known)
    right = _load(grad, (inner, columns[None]), live, inside)
    return total + _dot(left, right, 0, 0)

  whole, last = (end - start) // tiling.rows, pl.cdiv(end - start, tiling.rows)
  total = jnp.zeros((tiling.depth, tiling.columns), jnp.float32)
  total = lax.fori_loop(0, whole, lambda i, total: step(i, total, False), total)
  total = lax.fori_loop(whole, last, lambda i, total: step(i, total, True), total)
  _store(out, (group, rows[:, None], columns[None]), total, known, inside)


def _iota(size):
  return jnp.arange(size, dtype=jnp.int32)


def _mask(index, size, block):
  """Which indices exist; None where the block divides the size: all do."""
  return None if size % block == 0 else index < size


def _both(down, across):
  """bool[a] or None, bool[b] or None -> bool[a, b], or None where nothing is masked."""
  masks = [x for x in (down if down is None else down[:, None], across) if x is not None]
  return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref, where, down, across):
  mask = _both(down, across)
  target = ref.at[where]
  return plt.load(target) if mask is None else plt.load(target, mask=mask, other=0)


def _store(ref, where, value, down, across):
  plt.store(ref.at[where], value.astype(ref.dtype), mask=_both(down, across))


def _dot(left, right, left_axis, right_axis):
  """A product in float32; float32 factors are not rounded to TF32."""
  precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  return lax.dot_general(
    left,
    right.astype(left.dtype),
    (((left_axis,), (right_axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _call(kernel, out_shape, *, grid, tiling):
  call = pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid=grid,
    compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
    interpret=op.interpreted(),
  )

  def for_target(*args):
    with op.for_target():
      return call(*args)

  return for_target


def _shrunk(tiling, rows, columns, depth):
  """Tiles no larger than the matrices need: powers of two, at least 16 as `tl.dot` asks."""
  rows, columns, depth = (max(16, pl.next_power_of_2(max(x, 1))) for x in (rows, columns, depth))
  return dataclasses.replace(
    tiling,
    rows=min(tiling.rows, rows),
    columns=min(tiling.columns, columns),
    depth=min(tiling.depth, depth),
  )
