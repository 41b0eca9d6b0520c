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
from kernels_pallas.grouped_matmul.tpu_tiling import (
  candidates,
  gradient_bytes,
  gradient_tiling,
  product_bytes,
  product_tiling,
  swiglu_tiling,
  vmem_limit,
)
from kernels_pallas.op import Tiling

__all__ = ["candidates", "forward", "gradient_rhs", "swiglu"]

LANES = 128


def forward(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  transpose_rhs: bool = False,
  by_row: bool = False,
  tiling: Tiling | None = None,
) -> jax.Array:
  """[R, D] x [E, D, F] -> [R, F] (transposed: [R, F] x [E, D, F] -> [R, D]), zero beyond the groups.

  The columns of a tile need not divide the output's. With `by_row` what is stored is the view
  [R, F / 128, 128], of which `kernels_pallas.permute` copies single rows: XLA drops the reshape to
  [R, F] with the one back. For any other use of the output it costs a copy of it.
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
    by_row=by_row and _views_by_row(width, tiling.columns),
    tiling=tiling,
    interpret=op.interpreted(),
  )
  return out.reshape(lhs.shape[0], width)


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
    by_row=False,
    tiling=tiling,
    interpret=op.interpreted(),
  )
  return (out[0], tuple(out[1:])) if keep else out[0]


def _views_by_row(width, columns):
  """Whether blocks of the view are whole tiles."""
  whole = columns == width or columns % (8 * LANES) == 0
  return width % LANES == 0 and whole


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
  jax.jit, static_argnames=("transpose_rhs", "halves", "keep", "by_row", "tiling", "interpret")
)
def _products(lhs, rhs, group_sizes, *, transpose_rhs, halves, keep, by_row, tiling, interpret):
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

  out_block = pl.BlockSpec((tiling.rows, columns), lambda n, v, s: (s.tile[v], n))
  out_size, scratch = (rows, width), []
  if by_row:
    pieces = columns // LANES, LANES
    out_block = pl.BlockSpec((tiling.rows, *pieces), lambda n, v, s: (s.tile[v], n, 0))
    out_size = rows, width // LANES, LANES
    scratch = [pltpu.VMEM((tiling.step or tiling.rows, *pieces), jnp.float32)]

  kernel = functools.partial(
    _products_kernel,
    parts=parts,
    outputs=outputs,
    experts=experts,
    transpose_rhs=transpose_rhs,
    tiling=tiling,
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
      out_specs=[out_block] * outputs,
      scratch_shapes=scratch,
    ),
    out_shape=[op.shape_like(out_size, lhs.dtype, lhs, rhs, group_sizes)] * outputs,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(
        product_bytes(
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


def _products_kernel(visits, lhs, *refs, parts, outputs, experts, transpose_rhs, tiling):
  weights, outs, scratch = refs[:parts], refs[parts : parts + outputs], refs[parts + outputs :]
  group, low, high = _own_rows(visits, pl.program_id(1), tiling)
  axis = 1 if transpose_rhs else 0

  def store(at, own, values):
    for out, value in zip(outs, values, strict=True):
      if scratch and value.ndim:
        value = _by_row(value, *scratch)
      kept = out[at].astype(jnp.float32)
      own = own.reshape(-1, *[1] * (kept.ndim - 1))
      out[at] = jnp.where(own, value, kept).astype(out.dtype)

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


def _by_row(value, scratch):
  """[step, columns] -> [step, columns / 128, 128], by stores that skip from row to row."""
  for piece in range(scratch.shape[1]):
    scratch[:, piece, :] = value[:, piece * LANES : (piece + 1) * LANES]
  return scratch[...]


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
      vmem_limit_bytes=vmem_limit(gradient_bytes(tiling.rows, part, columns, lhs.dtype, dtype)),
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
