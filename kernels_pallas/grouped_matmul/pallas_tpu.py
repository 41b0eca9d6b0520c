"""Grouped matmul for TPUs: forward, transposed weights, SwiGLU and the weight gradient.

A grid step is a visit: one row tile for one group that has rows in it. A tile on the border of
groups is visited once for each, and stays in vector memory meanwhile; a visit multiplies only those
`step`s of the tile's rows that its group touches, and stores the group's own rows. The summed axis
is never cut, so a group's matrix is fetched once for all of its consecutive tiles. The rows beyond
the groups are a last group whose visits store zeros and fetch nothing.

Which visits there are is computed outside (`_visits`) and prefetched as scalars; the grid is as
long as they are many.

Fields of a `Tiling` that count: rows, columns, step; in the weight gradient columns are those of
the output and depth is its rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import op
from kernels_pallas.op import Tiling

# Rows multiplied at once: one pass of a 128 x 128 matrix unit.
STEP = 128
# A group's block of weights. Fetching 12 MiB takes 15 us on a v5e (819 GB/s), in which it multiplies
# 240 rows by it at 197 TFLOP/s: less than a tile of `ROWS`, which hides it.
WEIGHT_BLOCK = 12 << 20
ROWS = 512
# Of the vector memory: the rest is for what the compiler keeps.
SHARE = 0.7


def forward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  transpose_rhs: bool = False,
  tiling: Tiling | None = None,
) -> jax.Array:
  """[R, D] x [E, D, F] -> [R, F] (transposed: [R, F] x [E, D, F] -> [R, D]), zero beyond the groups.

  The columns of a tile need not divide the output's.
  """
  depth, width = rhs.shape[:0:-1] if transpose_rhs else rhs.shape[1:]
  tiling = tiling or product_tiling(lhs.shape[0], depth, width, rhs.shape[0], lhs.dtype)
  (out,) = _products(
    lhs,
    rhs,
    group_sizes,
    transpose_rhs=transpose_rhs,
    halves=False,
    keep=False,
    tiling=tiling,
    interpret=op.interpreted(),
  )
  return out


def swiglu(
  lhs: jax.Array,
  gate_up: jax.Array,
  group_sizes: jax.Array,
  *,
  keep: bool,
  tiling: Tiling | None = None,
):
  """[R, D] x [E, D, 2F] -> silu(gate) * up [R, F]; with `keep` also (gate, up), each [R, F].

  Where F has no divisor that makes tiles (it is no multiple of 128, or its smallest such tile is
  too large), this is a product and a separate activation.

  Raises:
    ValueError: if the columns of `tiling` do not divide F.
  """
  experts, depth, width = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
  tiling = tiling or swiglu_tiling(lhs.shape[0], depth, width, experts, lhs.dtype, keep)
  if tiling is None:
    pre = forward(lhs, gate_up, group_sizes)
    gate, up = pre[:, :width], pre[:, width:]
    act = _silu_product(gate, up)
    return (act, (gate, up)) if keep else act
  if width % tiling.columns:
    raise ValueError(f"columns must divide F={width}, got {tiling}")
  out = _products(
    lhs,
    gate_up,
    group_sizes,
    transpose_rhs=False,
    halves=True,
    keep=keep,
    tiling=tiling,
    interpret=op.interpreted(),
  )
  return (out[0], tuple(out[1:])) if keep else out[0]


def _silu_product(gate, up):
  return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def gradient_rhs(
  lhs: jax.Array,
  grad: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype,
  tiling: Tiling | None = None,
) -> jax.Array:
  """[R, D], [R, F] -> [E, D, F], each group's product summed in float32; zero for empty groups."""
  depth, width, experts = lhs.shape[1], grad.shape[1], group_sizes.shape[0]
  tiling = tiling or gradient_tiling(lhs.shape[0], depth, width, experts, lhs.dtype, dtype)
  return _gradient_rhs(
    lhs, grad, group_sizes, dtype=jnp.dtype(dtype), tiling=tiling, interpret=op.interpreted()
  )


def product_tiling(rows: int, depth: int, width: int, experts: int, dtype) -> Tiling:
  """Tiles of `forward`: as many columns as fit, rows of a group or up to `ROWS` of them.

  Two cores share the columns. At 65536 x [64, 2048, 2048] in bfloat16: 512 rows, all 2048 columns
  on one core, 1024 on each of two. Double-buffered that is
  2 x (512 x 2048 + 2048 x 2048 + 512 x 2048) x 2 bytes = 24 MiB of v5e's 128, and
  2 x (512 x 2048 + 2048 x 1024 + 512 x 1024) x 2 bytes = 14 MiB of v5p's 64.
  """
  tile, step = _rows(rows, depth, experts, dtype)
  for columns in _parts(width, op.chip().cores):
    if _product_fits(tile, step, depth, columns, dtype, parts=1, outputs=1):
      break
  return Tiling(rows=tile, columns=columns, step=step)


def swiglu_tiling(
  rows: int, depth: int, width: int, experts: int, dtype, keep: bool
) -> Tiling | None:
  """As `product_tiling`, for two matrices and one or three outputs; columns divide `width`.

  At 65536 x [64, 2048, 2 x 1024]: all 1024 columns of either matrix on one core, 512 on two.
  """
  tile, step = _rows(rows, depth, experts, dtype)
  for columns in _parts(width, op.chip().cores):
    if width % columns == 0 == columns % 128 and _product_fits(
      tile, step, depth, columns, dtype, parts=2, outputs=3 if keep else 1
    ):
      return Tiling(rows=tile, columns=columns, step=step)
  return None


def gradient_tiling(rows: int, depth: int, width: int, experts: int, dtype, out_dtype) -> Tiling:
  """Tiles of `gradient_rhs`: the largest part of a group's [D, F] that fits.

  The larger it is, the less often rows are read: F / columns and D / depth times. At 2048 x 2048
  with a float32 output all of it on v5e: 16 MiB summed, as much of a product that is added, 32
  stored, 8 of rows. Two cores share D: 1024 x 2048 on v5p, 8 + 8 + 16 + 6 MiB of 64.
  """
  tile, step = _rows(rows, max(depth, width), experts, dtype)
  sizes = [
    (part, columns)
    for part in _parts(depth, op.chip().cores)
    for columns in _parts(width, 1)
    if _gradient_bytes(tile, part, columns, dtype, out_dtype) <= SHARE * op.chip().vmem
  ]
  # Bytes of rows read per output element; among equals the one with more columns.
  part, columns = min(sizes, key=lambda size: (1 / size[0] + 1 / size[1], -size[1]))
  return Tiling(rows=tile, columns=columns, depth=part, step=step)


def candidates(shape: tuple[int, int, int, int], dtype) -> tuple[Tiling, ...]:
  """Tilings worth timing for (R, E, D, F), for all passes; some may not fit the chip."""
  rows, _, depth, width = shape
  found = [
    Tiling(rows=tile, columns=columns, depth=part, step=step)
    for tile in (128, 256, 512, 1024)
    for step in (128, 256, 512)
    if step <= tile <= max(rows, 128)
    for columns in sorted({min(width, c) for c in (256, 512, 1024, 2048)})
    for part in sorted({min(depth, d) for d in (512, 1024, 2048)})
  ]
  return tuple(found)


def _rows(rows, depth, experts, dtype):
  """Rows of a tile and of a step: not far beyond a group's, and a quarter of the memory at most."""
  size = jnp.dtype(dtype).itemsize
  few = -(-rows // (32 // size)) * (32 // size)
  if few <= STEP:
    return few, few
  tile = min(ROWS, 1 << (max(rows // experts, STEP) - 1).bit_length())
  while tile > STEP and 2 * size * tile * depth > op.chip().vmem // 4:
    tile //= 2
  return tile, STEP


def _parts(size, at_least):
  """Tiles along an axis, widest first: equal parts up to rounding to 128 lanes, or all of it."""
  seen = set()
  for count in range(at_least if size > 128 else 1, -(-size // 128) + 1):
    part = size if count == 1 else -(-size // (128 * count)) * 128
    if part not in seen:
      seen.add(part)
      yield part


def _product_fits(rows, step, depth, columns, dtype, *, parts, outputs):
  weights = parts * depth * columns * jnp.dtype(dtype).itemsize
  needed = _product_bytes(rows, step, depth, columns, dtype, parts=parts, outputs=outputs)
  return weights <= WEIGHT_BLOCK and needed <= SHARE * op.chip().vmem


def _product_bytes(rows, step, depth, columns, dtype, *, parts, outputs):
  """Two buffers of every block, and float32 results of a step before and after they are stored."""
  blocks = rows * depth + parts * depth * columns + outputs * rows * columns
  return 2 * jnp.dtype(dtype).itemsize * blocks + 8 * parts * step * columns


def _gradient_bytes(rows, depth, columns, dtype, out_dtype):
  """Two buffers of every block, the float32 sum, and one product that is added to it."""
  size, out_size = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize
  return 2 * size * rows * (depth + columns) + (8 + 2 * out_size) * depth * columns


class _Visits(NamedTuple):
  """Prefetched scalars. starts, ends: [E + 1], the rows of each group and of the rest; the others:
  [visits], the group that is visited, its row tile, and the blocks of lhs and rhs to have at hand.
  """

  starts: jax.Array
  ends: jax.Array
  group: jax.Array
  tile: jax.Array
  lhs_tile: jax.Array
  rhs_group: jax.Array


def _visits(group_sizes, rows, tile, *, rest: bool):
  """-> (_Visits, their number). rest: the rows beyond the groups are visited, and empty groups are
  not; otherwise each empty group is, once.
  """
  sizes = group_sizes.astype(jnp.int32)
  experts, tiles = sizes.shape[0], -(-rows // tile)
  left = rows - sizes.sum(dtype=jnp.int32)
  sizes = jnp.concatenate([sizes, left[None]])
  ends = jnp.cumsum(sizes, dtype=jnp.int32)
  starts = ends - sizes
  first = jnp.minimum(starts // tile, tiles - 1)
  counts = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0 if rest else 1)
  counts = counts if rest else counts.at[experts].set(0)
  until = jnp.cumsum(counts, dtype=jnp.int32)
  visit = jnp.arange(tiles + experts, dtype=jnp.int32)
  group = jnp.minimum((visit[:, None] >= until).sum(1, dtype=jnp.int32), experts)
  at = first[group] + visit - (until - counts)[group]
  at = jnp.clip(at, 0, tiles - 1)
  # The rest fetches nothing new.
  last_row = jnp.maximum(ends[experts - 1] - 1, 0)
  last_group = jnp.minimum((ends[:experts] <= last_row).sum(dtype=jnp.int32), experts - 1)
  resting = group == experts
  lhs_tile = jnp.where(resting, last_row // tile, at)
  rhs_group = jnp.where(resting, last_group, group)
  return _Visits(starts, ends, group, at, lhs_tile, rhs_group), until[-1]


@functools.partial(
  jax.jit, static_argnames=("transpose_rhs", "halves", "keep", "tiling", "interpret")
)
def _products(lhs, rhs, group_sizes, *, transpose_rhs, halves, keep, tiling, interpret):
  from jax.experimental.pallas import tpu as pltpu

  rows, depth = lhs.shape
  experts, width = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
  parts, outputs = (2, 3 if keep else 1) if halves else (1, 1)
  width //= parts
  columns, steps = tiling.columns, -(-width // tiling.columns)
  visits, count = _visits(group_sizes, rows, tiling.rows, rest=True)

  def rhs_block(part):
    if transpose_rhs:
      return pl.BlockSpec((None, columns, depth), lambda n, v, s: (s.rhs_group[v], n, 0))
    return pl.BlockSpec((None, depth, columns), lambda n, v, s: (s.rhs_group[v], 0, n + part))

  kernel = functools.partial(
    _products_kernel, parts=parts, experts=experts, transpose_rhs=transpose_rhs, tiling=tiling
  )
  size = lhs.dtype.itemsize
  call = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(steps, count),
      in_specs=[
        pl.BlockSpec((tiling.rows, depth), lambda n, v, s: (s.lhs_tile[v], 0)),
        *(rhs_block(part * steps) for part in range(parts)),
      ],
      out_specs=[pl.BlockSpec((tiling.rows, columns), lambda n, v, s: (s.tile[v], n))] * outputs,
    ),
    out_shape=[op.shape_like((rows, width), lhs.dtype, lhs, rhs, group_sizes)] * outputs,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=_limit(
        _product_bytes(
          tiling.rows,
          tiling.step or tiling.rows,
          depth,
          columns,
          lhs.dtype,
          parts=parts,
          outputs=outputs,
        )
      ),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * depth * width * parts,
      transcendentals=rows * width * (parts - 1),
      bytes_accessed=size * (steps * lhs.size + rhs.size + outputs * rows * width),
    ),
    interpret=interpret,
    name="grouped_swiglu" if halves else "grouped_matmul",
  )
  with op.for_target():
    return call(visits, lhs, *[rhs] * parts)


def _products_kernel(visits, lhs, *refs, parts, experts, transpose_rhs, tiling):
  weights, outs = refs[:parts], refs[parts:]
  group, low, high = _own_rows(visits, pl.program_id(1), tiling)
  axis = 1 if transpose_rhs else 0

  def store(at, own, values):
    for out, value in zip(outs, values, strict=True):
      kept = out[at, :].astype(jnp.float32)
      out[at, :] = jnp.where(own, value, kept).astype(out.dtype)

  def multiply(at, own):
    rows = lhs[at, :]
    products = [
      lax.dot_general(
        rows, weight[...], (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
      )
      for weight in weights
    ]
    if parts == 2:
      gate, up = products
      products = [gate * jax.nn.sigmoid(gate) * up, gate, up][: len(outs)]
    store(at, own, products)

  @pl.when(group < experts)
  def _():
    _for_each_step(low, high, tiling, multiply)

  @pl.when(group == experts)
  def _():
    _for_each_step(low, high, tiling, lambda at, own: store(at, own, [jnp.float32(0)] * len(outs)))


def _own_rows(visits, visit, tiling):
  """The group of a visit, and which rows of the tile are its own: low <= row < high."""
  group, base = visits.group[visit], visits.tile[visit] * tiling.rows
  low = jnp.maximum(visits.starts[group] - base, 0)
  return group, low, jnp.minimum(visits.ends[group] - base, tiling.rows)


def _for_each_step(low, high, tiling, body):
  """body(slice of the tile, bool[step, 1] of its own rows) for each step that has own rows."""
  step = tiling.step or tiling.rows

  def run(i, _):
    start = pl.multiple_of(i * step, step)
    row = start + lax.broadcasted_iota(jnp.int32, (step, 1), 0)
    body(pl.ds(start, step), (row >= low) & (row < high))

  lax.fori_loop(low // step, (high + step - 1) // step, run, None)


@functools.partial(jax.jit, static_argnames=("dtype", "tiling", "interpret"))
def _gradient_rhs(lhs, grad, group_sizes, *, dtype, tiling, interpret):
  from jax.experimental.pallas import tpu as pltpu

  rows, depth, width, experts = *lhs.shape, grad.shape[1], group_sizes.shape[0]
  part, columns = tiling.depth or depth, tiling.columns
  grid = -(-depth // part), -(-width // columns)
  visits, count = _visits(group_sizes, rows, tiling.rows, rest=False)
  read = lhs.dtype.itemsize * rows * (grid[1] * depth + grid[0] * width)
  call = pl.pallas_call(
    functools.partial(_gradient_kernel, tiling=tiling),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(*grid, count),
      in_specs=[
        pl.BlockSpec((tiling.rows, part), lambda d, n, v, s: (s.tile[v], d)),
        pl.BlockSpec((tiling.rows, columns), lambda d, n, v, s: (s.tile[v], n)),
      ],
      out_specs=pl.BlockSpec((None, part, columns), lambda d, n, v, s: (s.group[v], d, n)),
      scratch_shapes=[pltpu.VMEM((part, columns), jnp.float32)],
    ),
    out_shape=op.shape_like((experts, depth, width), dtype, lhs, grad, group_sizes),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=_limit(_gradient_bytes(tiling.rows, part, columns, lhs.dtype, dtype)),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * depth * width,
      transcendentals=0,
      bytes_accessed=read + dtype.itemsize * experts * depth * width,
    ),
    interpret=interpret,
    name="grouped_matmul_gradient_rhs",
  )
  with op.for_target():
    return call(visits, lhs, grad)


def _gradient_kernel(visits, lhs, grad, out, total, *, tiling):
  visit, last = pl.program_id(2), pl.num_programs(2) - 1
  group, low, high = _own_rows(visits, visit, tiling)

  @pl.when((visit == 0) | (visits.group[jnp.maximum(visit - 1, 0)] != group))
  def _():
    total[...] = jnp.zeros_like(total)

  def add(at, own):
    # Both factors are cut: a poisoned row beyond the group must not leak through 0 * inf.
    a, b = (jnp.where(own, x[at, :], jnp.zeros((), x.dtype)) for x in (lhs, grad))
    dims = ((0,), (0,)), ((), ())
    total[...] += lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

  _for_each_step(low, high, tiling, add)

  @pl.when((visit == last) | (visits.group[jnp.minimum(visit + 1, last)] != group))
  def _():
    out[...] = total[...].astype(out.dtype)


def _limit(needed):
  """Vector memory to ask for: what the blocks need and a quarter more, for the compiler."""
  return int(min(op.chip().vmem, max(needed * 1.25 + (4 << 20), 16 << 20)))
