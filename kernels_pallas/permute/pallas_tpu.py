"""To expert order and back on TPUs: rows copied singly, many copies in flight.

A copy needs whole tiles, and a row of [T, D] lies spread over the tiles of its neighbours. So rows
are copied from the view [T, D / 128, 128], in which each is a piece of memory of its own. Giving an
array that view moves all of it, which is little for tokens and much for the k times as many rows:
`grouped_matmul(..., by_row=True)` stores its output so that the view of it is free. What is
written here in expert order is laid out in rows again, in vector memory.

Within a grid step rows come in chunks: while one is worked on, the copies of the next are under
way. Where D is no multiple of 128 the reference's gathers are used.

Fields of a `Tiling` that count: rows of a grid step, and step, those of a chunk (slots, not tokens,
in `weighted_combine`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import op
from kernels_pallas.op import Tiling
from kernels_pallas.permute import reference

LANES = 128
# Of 2048 numbers in bfloat16, 64 rows are 256 KiB, which a v5e's memory gives in 0.3 us (819 GB/s).
# The output of a grid step, held twice, is 4 MiB. Neither has been timed on a TPU.
GATHER = Tiling(rows=512, columns=LANES, step=64)
COMBINE = Tiling(rows=1024, columns=LANES, step=64)


def gather(x: jax.Array, index: jax.Array, *, tiling: Tiling | None = None) -> jax.Array:
  """See `kernels_pallas.permute.reference.gather`."""
  if x.shape[1] % LANES:
    return reference.gather(x, index)
  tiling = _fitted(tiling or GATHER, index.shape[0], 1)
  return _gather(x, index, None, None, tiling=tiling, interpret=op.interpreted())


def gather_scaled(x, index, scale, rows, *, tiling: Tiling | None = None):
  """See `kernels_pallas.permute.reference.gather_scaled`."""
  if x.shape[1] % LANES:
    return reference.gather_scaled(x, index, scale, rows)
  tiling = _fitted(tiling or GATHER, index.shape[0], 1)
  out, products = _gather(x, index, scale, rows, tiling=tiling, interpret=op.interpreted())
  return out, products[:, 0]


def weighted_combine(rows, weights, inverse, *, tiling: Tiling | None = None) -> jax.Array:
  """See `kernels_pallas.permute.reference.weighted_combine`."""
  if rows.shape[1] % LANES:
    return reference.weighted_combine(rows, weights, inverse)
  tiling = _fitted(tiling or COMBINE, inverse.size, inverse.shape[1])
  return _combine(rows, weights, inverse, tiling=tiling, interpret=op.interpreted())


def _fitted(tiling, slots, k):
  """No more rows than there are; chunks of whole tokens, and grid steps of whole chunks."""
  tokens = max(min(tiling.step or tiling.rows, slots) // k, 1)
  chunks = max(min(tiling.rows, slots) // (tokens * k), 1)
  # A block of tokens ends with a tile of 8 rows.
  chunk = -(-tokens // 8) * 8 * k
  return Tiling(rows=chunk * chunks, columns=LANES, step=chunk)


def _by_row(x):
  return x.reshape(x.shape[0], -1, LANES)


def _blocks(x, size):
  """[R, ...] -> [blocks, 1, size]: scalars of one grid step, the last block filled up with -1."""
  x = x.reshape(-1)
  count = -(-x.shape[0] // size)
  return jnp.pad(x, (0, count * size - x.shape[0]), constant_values=-1).reshape(count, 1, size)


def _scalars(size):
  from jax.experimental.pallas import tpu as pltpu

  return pl.BlockSpec((None, 1, size), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)


def _start(source, index, first, buffer, arrived):
  """Starts the copies of a chunk; rows that are elsewhere are zero. Returns how many there are."""
  from jax.experimental.pallas import tpu as pltpu

  def row(r, started):
    at = index[0, first + r]
    here = (at >= 0) & (at < source.shape[0])

    @pl.when(here)
    def _():
      pltpu.make_async_copy(source.at[at], buffer.at[r], arrived).start()

    @pl.when(jnp.logical_not(here))
    def _():
      buffer[r] = jnp.zeros(buffer.shape[1:], buffer.dtype)

    return started + here.astype(jnp.int32)

  return lax.fori_loop(0, buffer.shape[0], row, jnp.int32(0))


def _wait(source, buffer, arrived, started):
  from jax.experimental.pallas import tpu as pltpu

  def one(_, carry):
    pltpu.make_async_copy(source.at[0], buffer.at[0], arrived).wait()
    return carry

  lax.fori_loop(0, started, one, None)


def _chunks(source, index, buffers, arrived, rows, work):
  """work(first row, buffer) on each chunk of a grid step, the next one's copies being under way."""
  chunk = buffers.shape[1]

  def start(i):
    return _start(source, index, i * chunk, buffers.at[i % 2], arrived.at[i % 2])

  def run(i, started):
    following = lax.cond(i + 1 < rows // chunk, lambda: start(i + 1), lambda: jnp.int32(0))
    _wait(source, buffers.at[i % 2], arrived.at[i % 2], started)
    work(pl.multiple_of(i * chunk, chunk), buffers.at[i % 2])
    return following

  lax.fori_loop(0, rows // chunk, run, start(jnp.int32(0)))


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))
def _gather(x, index, scale, rows, *, tiling, interpret):
  from jax.experimental.pallas import tpu as pltpu

  count, width = index.shape[0], x.shape[1]
  shape = width // LANES, LANES
  scaled = scale is not None
  dtype = rows.dtype if scaled else x.dtype
  chunk = (tiling.step, *shape)
  per_row = pl.BlockSpec((tiling.rows, *shape), lambda i: (i, 0, 0))
  out_specs = [pl.BlockSpec((tiling.rows, width), lambda i: (i, 0))]
  out_shape = [op.shape_like((count, width), dtype, x, index)]
  if scaled:
    out_specs.append(pl.BlockSpec((tiling.rows, 1), lambda i: (i, 0)))
    out_shape.append(op.shape_like((count, 1), jnp.float32, x, index))
  call = pl.pallas_call(
    functools.partial(_gather_kernel, tiling=tiling, scaled=scaled),
    grid=(-(-count // tiling.rows),),
    in_specs=[
      _scalars(tiling.rows),
      pl.BlockSpec(memory_space=pl.ANY),
      *([_scalars(tiling.rows), per_row] if scaled else []),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[
      pltpu.VMEM((2, *chunk), x.dtype),
      pltpu.SemaphoreType.DMA((2,)),
      *[pltpu.VMEM(chunk, jnp.float32)] * (2 if scaled else 1),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    cost_estimate=pl.CostEstimate(
      flops=(4 if scaled else 0) * count * width,
      transcendentals=0,
      bytes_accessed=(3 if scaled else 2) * count * width * x.dtype.itemsize,
    ),
    interpret=interpret,
    name="gather_rows_scaled" if scaled else "gather_rows",
  )
  more = [_blocks(scale.astype(jnp.float32), tiling.rows), _by_row(rows)] if scaled else []
  with op.for_target():
    out = call(_blocks(index, tiling.rows), _by_row(x), *more)
  return out if scaled else out[0]


def _gather_kernel(index, source, *refs, tiling, scaled):
  if scaled:
    scale, rows, out, products, buffers, arrived, wide, product = refs
  else:
    out, buffers, arrived, wide = refs

  def work(first, buffer):
    def row(r, _):
      value = buffer[r].astype(jnp.float32)
      if scaled:
        # Padding was not copied: there the buffer is zero, and the other factor may be NaN.
        here = index[0, first + r] >= 0
        here &= index[0, first + r] < source.shape[0]
        other = jnp.where(here, rows[first + r].astype(jnp.float32), 0.0)
        product[r] = other * value
        value = jnp.where(here, scale[0, first + r], 0.0) * value
      wide[r] = value

    lax.fori_loop(0, tiling.step, row, None)
    at = pl.ds(first, tiling.step)
    for lane in range(wide.shape[1]):
      out[at, lane * LANES : (lane + 1) * LANES] = wide[:, lane, :].astype(out.dtype)
    if scaled:
      total = sum(product[:, lane, :] for lane in range(wide.shape[1]))
      products[at, :] = total.sum(1, keepdims=True)

  _chunks(source, index, buffers, arrived, tiling.rows, work)


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))
def _combine(rows, weights, inverse, *, tiling, interpret):
  from jax.experimental.pallas import tpu as pltpu

  (tokens, k), width = inverse.shape, rows.shape[1]
  shape, block = (width // LANES, LANES), tiling.rows // k
  weighted = weights is not None
  call = pl.pallas_call(
    functools.partial(_combine_kernel, tiling=tiling, k=k, weighted=weighted),
    grid=(-(-tokens // block),),
    in_specs=[
      _scalars(tiling.rows),
      pl.BlockSpec(memory_space=pl.ANY),
      *([_scalars(tiling.rows)] if weighted else []),
    ],
    out_specs=pl.BlockSpec((block, *shape), lambda i: (i, 0, 0)),
    out_shape=op.shape_like((tokens, *shape), rows.dtype, rows, inverse),
    scratch_shapes=[
      pltpu.VMEM((2, tiling.step, *shape), rows.dtype),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    cost_estimate=pl.CostEstimate(
      flops=2 * tokens * k * width,
      transcendentals=0,
      bytes_accessed=tokens * (k + 1) * width * rows.dtype.itemsize,
    ),
    interpret=interpret,
    name="combine_rows",
  )
  more = [_blocks(weights.astype(jnp.float32), tiling.rows)] if weighted else []
  with op.for_target():
    out = call(_blocks(inverse, tiling.rows), _by_row(rows), *more)
  return out.reshape(tokens, width)


def _combine_kernel(inverse, source, *refs, tiling, k, weighted):
  *weights, out, buffers, arrived = refs

  def work(first, buffer):
    def token(t, _):
      total = jnp.zeros(buffer.shape[1:], jnp.float32)
      for j in range(k):
        value = buffer[t * k + j].astype(jnp.float32)
        if weighted:
          at = inverse[0, first + t * k + j]
          here = (at >= 0) & (at < source.shape[0])
          # A slot that is not here adds nothing, whatever its weight is.
          value = jnp.where(here, weights[0][0, first + t * k + j], 0.0) * value
        total += value
      out[first // k + t] = total.astype(out.dtype)

    lax.fori_loop(0, tiling.step // k, token, None)

  _chunks(source, inverse, buffers, arrived, tiling.rows, work)
