"""Grouped matmul for Hopper GPUs (H100, H200): wgmma fed by the tensor memory accelerator.

Three warpgroups per multiprocessor: one copies tiles of both factors into a ring of shared memory,
two multiply, each its half of the rows of a tile, and store. Blocks are persistent, so the copies
of the next tile run while this one is stored. No factor is transposed in memory: wgmma reads
either order of 16-bit numbers.

Shared memory sets the tiles. Of 227 KiB the output takes 32 (two warpgroups, two chunks in flight,
64 rows of 128 bytes); four stages of (128 + 256) x 64 bfloat16 take 192. The float32 sums of
64 x 256 fill 128 of a thread's 232 registers, which is the most that leaves room for the rest.
Compiled by ptxas for sm_90a (168 registers; nothing is spilled but 44 bytes by SwiGLU under jax
0.10.2) and interpreted; not yet timed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import op
from kernels_pallas.grouped_matmul import mosaic_ring as ring
from kernels_pallas.grouped_matmul.row_tiles import row_tiles

FORWARD = op.Tiling(rows=128, columns=256, depth=64, stages=4)
# Gate and up are multiplied side by side: half the columns each.
SWIGLU = op.Tiling(rows=128, columns=128, depth=64, stages=4)
# Of a tile of weights depth is the rows (D); rows are those that are summed in one step.
GRADIENT_RHS = op.Tiling(rows=64, columns=256, depth=128, stages=4)


def candidates(shape: tuple[int, int, int, int], dtype) -> tuple[op.Tiling, ...]:
  """Tilings worth timing for (R, E, D, F), for all passes; some fit one of them only."""
  del shape  # a tile's waste depends on the group's last rows, which it does not tell
  sides = ((128, 256), (128, 192), (128, 128), (256, 128), (128, 64), (256, 64))
  found = [FORWARD, GRADIENT_RHS]
  for rows, columns in sides:
    for depth in (64, 128):
      room = ring.SHARED_MEMORY - 1024 - 2 * rows * ring.SWIZZLE  # beside barriers and output
      most = room // ((rows + columns) * depth * jnp.dtype(dtype).itemsize)
      for stages in sorted({min(most, 8), most - 1, 3}, reverse=True):
        if 2 <= stages <= most:
          found.append(op.Tiling(rows=rows, columns=columns, depth=depth, stages=stages))
          found.append(op.Tiling(rows=depth, columns=columns, depth=rows, stages=stages))
  return tuple(dict.fromkeys(found))


def forward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  transpose_rhs: bool = False,
  tiling: op.Tiling | None = None,
) -> jax.Array:
  """[R, D] x [E, D, F] -> [R, F] (transposed: [R, F] x [E, D, F] -> [R, D]), zero beyond the groups.

  Sides that 64 does not divide (R: 8) are padded by a copy.

  Raises:
    ValueError: for numbers that are not 16 bits wide, or tiles that do not fit.
  """
  width = rhs.shape[1 if transpose_rhs else 2]
  rhs = _padded(rhs, (1, 64, 64))
  (out,) = _products(
    lhs,
    rhs if transpose_rhs else rhs[:, :, None],
    group_sizes,
    finish=lambda product: ((0, 0, product),),
    parts=(1,),
    transpose_rhs=transpose_rhs,
    tiling=tiling or FORWARD,
  )
  return out[:, 0, :width]


def swiglu(
  lhs: jax.Array,
  gate_up: jax.Array,
  group_sizes: jax.Array,
  *,
  keep: bool,
  tiling: op.Tiling | None = None,
):
  """[R, D] x [E, D, 2F] -> silu(gate) * up [R, F]; with `keep` also both before it, [R, 2F].

  Raises:
    ValueError: as `forward` does.
  """
  experts, depth, width = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
  rhs = _padded(gate_up.reshape(experts, depth, 2, width), (1, 64, 1, 64))

  def finish(gate, up):
    activation = ((0, 0, jax.nn.sigmoid(gate) * gate * up),)
    return (*activation, (1, 0, gate), (1, 1, up)) if keep else activation

  out = _products(
    lhs,
    rhs,
    group_sizes,
    finish=finish,
    parts=(1, 2) if keep else (1,),
    transpose_rhs=False,
    tiling=tiling or SWIGLU,
  )
  flat = [x[..., :width].reshape(lhs.shape[0], -1) for x in out]
  return tuple(flat) if keep else flat[0]


def gradient_rhs(
  lhs: jax.Array,
  grad: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype,
  tiling: op.Tiling | None = None,
) -> jax.Array:
  """[R, D], [R, F] -> [E, D, F] in `dtype`, accumulated in float32; zero for empty groups.

  Raises:
    ValueError: as `forward` does.
  """
  depth, width, groups = lhs.shape[1], grad.shape[1], group_sizes.shape[0]
  tiling = tiling or GRADIENT_RHS
  _check(lhs, grad, tiling, tiling.depth, tiling.rows)
  if not lhs.shape[0]:
    return jnp.zeros((groups, depth, width), dtype)
  lhs, grad = (_padded(x, (8, 64)) for x in (lhs, grad.astype(lhs.dtype)))
  half = tiling.depth // ring.WARPGROUPS
  tiles = (
    ring.shared((tiling.stages, ring.WARPGROUPS, tiling.rows, half), lhs.dtype),
    ring.shared((tiling.stages, tiling.rows, tiling.columns), lhs.dtype),
  )
  kernel = ring.kernel(
    functools.partial(_gradient_rhs_kernel, tiling=tiling),
    (jax.ShapeDtypeStruct((groups, lhs.shape[1], grad.shape[1]), dtype),),
    (
      *tiles,
      ring.staging(half, dtype),
      *ring.barriers(tiling.stages, ring.WARPGROUPS + 1),
      ring.meeting(),
    ),
    "grouped_gradient_rhs",
  )
  ends = jnp.cumsum(group_sizes.astype(jnp.int32))
  (out,) = kernel(ends - group_sizes.astype(jnp.int32), ends, lhs, grad)
  return out[:, :depth, :width]


def _products(lhs, rhs, group_sizes, *, finish, parts, transpose_rhs, tiling):
  """Row tiles times columns of [E, K, P, W] (transposed: [E, W, K]) -> per output [R, p, W]."""
  _check(lhs, rhs, tiling, tiling.rows, tiling.depth)
  rows, width = lhs.shape[0], rhs.shape[1 if transpose_rhs else 3]
  dtype, sides = lhs.dtype, 1 if transpose_rhs else rhs.shape[2]
  if not rows:
    return [jnp.zeros((0, size, width), dtype) for size in parts]
  lhs = _padded(lhs, (8, 64))
  block = (tiling.columns, tiling.depth) if transpose_rhs else (tiling.depth, tiling.columns)
  half = tiling.rows // ring.WARPGROUPS
  kernel = ring.kernel(
    functools.partial(
      _products_kernel, finish=finish, sides=sides, transpose_rhs=transpose_rhs, tiling=tiling
    ),
    [jax.ShapeDtypeStruct((rows, size, width), dtype) for size in parts],
    (
      ring.shared((tiling.stages, tiling.rows, tiling.depth), dtype),
      ring.shared((tiling.stages, sides, *block), dtype),
      ring.staging(half, dtype),
      *ring.barriers(tiling.stages, 1 + sides),
    ),
    "grouped_matmul" if sides == 1 else "grouped_swiglu",
  )
  return kernel(*row_tiles(group_sizes, rows, tiling.rows, align=8), lhs, rhs.astype(dtype))


def _products_kernel(
  groups, starts, lows, highs, lhs, rhs, *rest, finish, sides, transpose_rhs, tiling
):
  *outs, lhs_ring, rhs_ring, staging, full, free = rest
  experts, depth = rhs.shape[0], lhs.shape[1]
  width = rhs.shape[1 if transpose_rhs else 3]
  half = tiling.rows // ring.WARPGROUPS
  warpgroup = lax.axis_index("warpgroup")
  grid = (groups.shape[0], pl.cdiv(width, tiling.columns))

  def tile(info):
    tile, column = info.index
    group, low, high = groups[tile], lows[tile], highs[tile]
    # The rows beyond the groups have no product; nor has a tile without rows.
    steps = jnp.where((group < experts) & (low < high), pl.cdiv(depth, tiling.depth), 0)
    return group, pl.multiple_of(starts[tile], 8), low, high, column * tiling.columns, steps

  def copy_tile(info, done):
    group, start, _, _, column, steps = tile(info)

    def copy(step, slot, barrier):
      inner = pl.ds(step * tiling.depth, tiling.depth)
      across = pl.ds(column, tiling.columns)
      rows = pl.ds(start, tiling.rows)
      plgpu.copy_gmem_to_smem(lhs.at[rows, inner], lhs_ring.at[slot], barrier)
      for side in range(sides):
        index = (group, across, inner) if transpose_rhs else (group, inner, side, across)
        plgpu.copy_gmem_to_smem(rhs.at[index], rhs_ring.at[slot, side], barrier)

    return ring.produce(full, free, done, steps, copy)

  def multiply_tile(info, done):
    _, start, low, high, column, steps = tile(info)

    def multiply(step, slot, *sums):
      left = lhs_ring.at[slot, pl.ds(warpgroup * half, half)]
      for side, total in enumerate(sums):
        right = rhs_ring.at[slot, side]
        plgpu.wgmma(total, left, right.transpose((1, 0)) if transpose_rhs else right)

    shape = (half, tiling.columns)
    done, *sums = ring.consume(full, free, done, steps, multiply, shapes=(shape,) * sides)
    first = start + warpgroup * half  # the row of this half
    live = [jnp.clip(x - first, 0, half) for x in (low, high)]
    for index, part, value in finish(*sums):
      ring.store(outs[index].at[:, part], staging.at[warpgroup], value, first, column, live)
    return done

  ring.run(grid, copy_tile, multiply_tile, full, free)


def _gradient_rhs_kernel(starts, ends, lhs, grad, out, *scratch, tiling):
  lhs_ring, grad_ring, staging, full, free, meeting = scratch
  groups, depth, width = out.shape
  half = tiling.depth // ring.WARPGROUPS
  warpgroup = lax.axis_index("warpgroup")
  grid = (groups, pl.cdiv(depth, tiling.depth), pl.cdiv(width, tiling.columns))

  def tile(info):
    group, row, column = info.index
    start, end = starts[group], ends[group]
    aligned = pl.multiple_of(start // 8 * 8, 8)
    steps = jnp.where(start < end, pl.cdiv(end - aligned, tiling.rows), 0)
    return group, row * tiling.depth, column * tiling.columns, start, end, aligned, steps

  def copy_tile(info, done):
    _, row, column, _, _, aligned, steps = tile(info)

    def copy(step, slot, barrier):
      inner = pl.ds(pl.multiple_of(aligned + step * tiling.rows, 8), tiling.rows)
      for part in range(ring.WARPGROUPS):
        piece = lhs.at[inner, pl.ds(row + part * half, half)]
        plgpu.copy_gmem_to_smem(piece, lhs_ring.at[slot, part], barrier)
      piece = grad.at[inner, pl.ds(column, tiling.columns)]
      plgpu.copy_gmem_to_smem(piece, grad_ring.at[slot], barrier)

    return ring.produce(full, free, done, steps, copy)

  def multiply_tile(info, done):
    group, row, column, start, end, aligned, steps = tile(info)

    def multiply(step, slot, total):
      first = aligned + step * tiling.rows
      begin, stop = start - first, end - first

      @pl.when((begin > 0) | (stop < tiling.rows))
      def clear_rows_of_others():
        ring.keep_rows(lhs_ring.at[slot, warpgroup], begin, stop)
        share = tiling.columns // ring.WARPGROUPS
        for part in range(ring.WARPGROUPS):
          columns = pl.ds(part * share, share)
          pl.when(warpgroup == part)(
            lambda columns=columns: ring.keep_rows(grad_ring.at[slot, :, columns], begin, stop)
          )
        plgpu.commit_smem()
        plgpu.barrier_arrive(meeting)
        plgpu.barrier_wait(meeting)

      left = lhs_ring.at[slot, warpgroup].transpose((1, 0))
      plgpu.wgmma(total, left, grad_ring.at[slot])

    shape = (half, tiling.columns)
    done, total = ring.consume(full, free, done, steps, multiply, shapes=(shape,))
    ring.store(out.at[group], staging.at[warpgroup], total, row + warpgroup * half, column)
    return done

  ring.run(grid, copy_tile, multiply_tile, full, free)


def _padded(x, multiples):
  """Zeros appended to each axis up to a multiple; the array itself where that needs none."""
  widths = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
  return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _check(lhs, rhs, tiling, rows, depth):
  """`rows` of the tile are split over warpgroups; `depth` of it is summed in one step."""
  for x in (lhs, rhs):
    if jnp.dtype(x.dtype) not in (jnp.bfloat16, jnp.float16):
      raise ValueError(
        f"mosaic_gpu multiplies bfloat16 and float16, got {lhs.dtype} and {rhs.dtype}: cast them, "
        "or use implementation='triton'"
      )
  if rows % (64 * ring.WARPGROUPS) or tiling.columns % 64 or tiling.columns > 256 or depth % 64:
    raise ValueError(
      "a tile's output must be a multiple of 128 by one of 64 up to 256, summed in steps of a "
      f"multiple of 64, got {rows} x {tiling.columns} in steps of {depth}"
    )
  if tiling.stages < 2:
    raise ValueError(f"two stages are the least, for copies to run ahead, got {tiling.stages}")
