"""To expert order and back on a GPU: each block moves a few whole rows, 16 bytes per thread.

In Pallas's Triton dialect, which every GPU since Ampere runs. All three are bound by memory: a block
has 16 KiB on their way before it needs the first, and rows that are absent are not read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import gpu, op

WARPS = 4
VECTOR = 16  # bytes, the widest access of a thread
COLUMNS = WARPS * 32 * VECTOR  # bytes of a row that a block reads at once
ROWS = 8  # of that many bytes each, in a block that gathers
TOKENS = 2  # of a block that combines, each with the rows of its slots


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
  """See `reference.gather`."""
  rows, width = index.shape[0], x.shape[1]
  if not x.size or not rows:
    return jnp.zeros((rows, width), x.dtype)
  columns = _columns(width, x.dtype)
  kernel = functools.partial(_gather_kernel, columns=columns)
  out = op.shape_like((rows, width), x.dtype, x, index)
  return _call(kernel, out, (pl.cdiv(rows, ROWS), pl.cdiv(width, columns)), x, index)


def _gather_kernel(x, index, out, *, columns):
  block, column = pl.program_id(0), pl.program_id(1)
  rows = block * ROWS + _iota(ROWS)
  exists = rows < out.shape[0]
  source = plt.load(index.at[rows], mask=exists, other=-1)
  across = column * columns + _iota(columns)
  taken = _take(x, source, across)
  mask = exists[:, None] & (across < out.shape[1])[None]
  plt.store(out.at[rows[:, None], across[None]], taken, mask=mask)


def gather_scaled(
  x: jax.Array, index: jax.Array, scale: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """See `reference.gather_scaled`: one reading of both for the rows and their products."""
  out = (
    op.shape_like(rows.shape, rows.dtype, x, rows),
    op.shape_like(rows.shape[:1], jnp.float32, x, rows),
  )
  if not x.size or not rows.size:
    return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), out)
  kernel = functools.partial(_gather_scaled_kernel, columns=_columns(rows.shape[1], rows.dtype))
  return _call(kernel, out, (pl.cdiv(rows.shape[0], ROWS),), x, index, scale, rows)


def _gather_scaled_kernel(x, index, scale, rows, out, products, *, columns):
  where = pl.program_id(0) * ROWS + _iota(ROWS)
  exists = where < out.shape[0]
  source = plt.load(index.at[where], mask=exists, other=-1)
  present = (source >= 0) & (source < x.shape[0])
  factor = plt.load(scale.at[where], mask=present, other=0)[:, None]

  def step(i, total):
    across = i * columns + _iota(columns)
    known = (across < out.shape[1])[None]
    target = where[:, None], across[None]
    taken = _take(x, source, across).astype(jnp.float32)
    # Where there is no gradient the row may be anything: it is not read.
    row = plt.load(rows.at[target], mask=present[:, None] & known, other=0)
    plt.store(out.at[target], (factor * taken).astype(out.dtype), mask=exists[:, None] & known)
    return total + (row.astype(jnp.float32) * taken).sum(1)

  steps = pl.cdiv(out.shape[1], columns)
  total = lax.fori_loop(0, steps, step, jnp.zeros(ROWS, jnp.float32))
  plt.store(products.at[where], total, mask=exists)


def weighted_combine(rows: jax.Array, weights: jax.Array | None, inverse: jax.Array) -> jax.Array:
  """See `reference.weighted_combine`."""
  (tokens, slots), width = inverse.shape, rows.shape[1]
  out = op.shape_like((tokens, width), rows.dtype, rows, inverse)
  if not rows.size or not inverse.size:
    return jnp.zeros(out.shape, out.dtype)
  columns = _columns(width, rows.dtype)
  kernel = functools.partial(_combine_kernel, columns=columns, slots=slots)
  args = (rows, inverse.reshape(-1), *(() if weights is None else (weights.reshape(-1),)))
  return _call(kernel, out, (pl.cdiv(tokens, TOKENS), pl.cdiv(width, columns)), *args)


def _combine_kernel(rows, inverse, *rest, columns, slots):
  *weights, out = rest
  block, column = pl.program_id(0), pl.program_id(1)
  tokens = block * TOKENS + _iota(TOKENS)
  exists = tokens < out.shape[0]
  across = column * columns + _iota(columns)
  total = jnp.zeros((TOKENS, columns), jnp.float32)
  for slot in range(slots):  # unrolled: the rows of all slots are on their way at once
    where = tokens * slots + slot
    source = plt.load(inverse.at[where], mask=exists, other=-1)
    taken = _take(rows, source, across).astype(jnp.float32)
    if weights:  # not read where the slot is elsewhere
      present = (source >= 0) & (source < rows.shape[0])
      taken = plt.load(weights[0].at[where], mask=present, other=0)[:, None] * taken
    total += taken
  mask = exists[:, None] & (across < out.shape[1])[None]
  plt.store(out.at[tokens[:, None], across[None]], total.astype(out.dtype), mask=mask)


def _take(x, source, across):
  """x[source, across], zero where there is no such row or column."""
  present = (source >= 0) & (source < x.shape[0])
  mask = present[:, None] & (across < x.shape[1])[None]
  source = jnp.where(present, source, 0)
  return plt.load(x.at[source[:, None], across[None]], mask=mask, other=0)


def _iota(size):
  return jnp.arange(size, dtype=jnp.int32)


def _columns(width, dtype):
  """Columns of a block, a power of two."""
  return min(COLUMNS // jnp.dtype(dtype).itemsize, max(16, pl.next_power_of_2(width)))


def _call(kernel, out_shape, grid, *args):
  gpu.check_offsets(*args, *jax.tree.leaves(out_shape))
  call = pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid=grid,
    compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=2),
    interpret=op.interpreted(),
  )
  with op.for_target():
    return call(*args)
