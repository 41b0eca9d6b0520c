"""The experts' layer for a few tokens on GPUs: two kernels in Pallas's Triton dialect.

The first multiplies by gate and up and activates, the second multiplies by down; a block takes the
rows of one expert and a tile of its columns, and streams that part of the weights. Blocks of one
expert follow each other, so that an expert with more than `ROWS` tokens has its weights read again
from the L2 cache (50 MB on H100; an expert of LLaDA-MoE has 13), not from memory. Between the two,
hidden activations [T * k, F] and outputs [T * k, D] pass through L2 as well: blocks cannot wait for
each other's sums, and adding atomically would make a token's result depend on chance. At 64 tokens
of LLaDA-MoE they are 1.3% of the weights' bytes. The second kernel weights its rows, and a token's
are added in the order of its slots.

Why not Mosaic: its asynchronous wgmma products and pipelined copies pay where products are the
limit. Here a weight takes part in 2 * ROWS operations per 2 bytes, 32 per byte; an H100 could do
295 (989 TFLOP/s over 3.35 TB/s). Loads in flight are what matters: `STAGES` tiles of 16 KiB per
block, 6 MB over 128 blocks, where 3.35 TB/s times some 600 ns of latency are 2 MB. Triton also runs
on GPUs before Hopper. jax announces the end of this dialect since 0.11; 0.12 still lowers it.

Speed is unmeasured: these kernels were lowered for CUDA, but have run interpreted only.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import op
from kernels_pallas.fused_moe.active import find_active, sum_slots
from kernels_pallas.fused_moe.quantize import Weights, split
from kernels_pallas.grouped_matmul.row_tiles import row_tiles

# The same for any number of tokens, so that a row's products are summed in the same order.
ROWS = 32
COLUMNS = 64
DEPTH = 64
STAGES = 3


def forward(
  x: jax.Array,
  gate_up: Weights,
  down: Weights,
  weights: jax.Array,
  experts: jax.Array,
  *,
  rows: int = ROWS,
  columns: int = COLUMNS,
  depth: int = DEPTH,
) -> jax.Array:
  """See `kernels_pallas.fused_moe.api.fused_moe`.

  Args:
    x, gate_up, down, weights, experts: as there.
    rows, columns, depth: of a block's product; powers of two, at least 16. They need divide
      nothing.

  Raises:
    ValueError: for weights that 32-bit offsets cannot address.
  """
  if math.prod(gate_up.shape) > 2**31:
    raise ValueError(
      f"these kernels address up to 2**31 weights, got gate_up {gate_up.shape}: hold fewer experts "
      "per device"
    )
  active = find_active(experts, down.shape[0])
  tiles = row_tiles(active.sizes, active.order.size, rows)
  # Slots of no expert here are a last group, which nobody computes.
  high = jnp.where(tiles.group < down.shape[0], tiles.high, tiles.start)
  where = jnp.minimum(tiles.group, down.shape[0] - 1), tiles.start, high
  call = functools.partial(_call, where=where, rows=rows, columns=columns, depth=depth)
  tokens = active.order // experts.shape[1]
  act = call(x, tokens, gate_up, parts=2, dtype=x.dtype)
  places = jnp.arange(active.order.size, dtype=jnp.int32)
  slot_weights = weights.astype(jnp.float32).reshape(-1)[active.order]
  out = call(act, places, down, slot_weights, parts=1, dtype=jnp.float32)
  return sum_slots(out, experts, active, down.shape[0]).astype(x.dtype)


def _call(x, source, weights, row_scale=None, *, where, parts, dtype, rows, columns, depth):
  """[S, width] in `dtype`: row s of the product is x[source[s]] times its expert's matrix.

  parts: 2: of two halves of the columns, silu of the first times the second.
  row_scale: float32[S], by which rows of the result are multiplied.
  """
  from jax.experimental.pallas import triton as plt

  matrices, scales = split(weights)
  width = matrices.shape[2] // parts
  call = pl.pallas_call(
    functools.partial(
      _kernel,
      parts=parts,
      rows=rows,
      columns=columns,
      depth=depth,
      scaled=scales is not None,
      weighted=row_scale is not None,
    ),
    out_shape=op.shape_like((source.shape[0], width), dtype, x, source),
    grid=(pl.cdiv(width, columns), where[0].shape[0]),
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=STAGES),
    interpret=op.interpreted(),
    name="fused_moe_swiglu" if parts == 2 else "fused_moe_down",
  )
  with op.for_target():
    return call(*where, source, x, matrices, *(s for s in (scales, row_scale) if s is not None))


def _kernel(
  expert, start, high, source, x, weights, *refs, parts, rows, columns, depth, scaled, weighted
):
  from jax.experimental.pallas import triton as plt

  scales = refs[0] if scaled else None
  row_scale, out = refs[-2:] if weighted else (None, refs[-1])
  column, tile = pl.program_id(0) * columns, pl.program_id(1)
  expert, start, high = expert[tile], start[tile], high[tile]
  count, width = x.shape[1], weights.shape[2] // parts
  row, column = start + _iota(rows), column + _iota(columns)
  live, inside = (row < high)[:, None], column < width
  # What does not exist is replaced by its neighbour, never masked: there is no zero of float8.
  # Rows beyond the expert's are not stored, columns neither, and depth has zeros on the left.
  known_row = jnp.minimum(row, source.shape[0] - 1)
  token = plt.load(source.at[known_row])[:, None]
  known_column = _within(column, width, columns)

  def step(i, sums):
    inner = i * depth + _iota(depth)
    mask = live if count % depth == 0 else live & (inner < count)[None]
    known = _within(inner, count, depth)
    left = plt.load(x.at[token, known[None]], mask=mask, other=0)
    return tuple(
      total
      + _dot(left, plt.load(weights.at[expert, known[:, None], part * width + known_column[None]]))
      for part, total in enumerate(sums)
    )

  zeros = jnp.zeros((rows, columns), jnp.float32)
  # No `where`: Triton's lowering gives one of scalars the type of its condition.
  steps = (start < high).astype(jnp.int32) * pl.cdiv(count, depth)
  products = lax.fori_loop(0, steps, step, (zeros,) * parts)
  if scaled:
    products = [
      product * plt.load(scales.at[expert, part * width + known_column])[None]
      for part, product in enumerate(products)
    ]
  result = products[0]
  if parts == 2:
    result = jax.nn.sigmoid(result) * result * products[1]
  if weighted:
    result *= plt.load(row_scale.at[known_row])[:, None]
  where = out.at[row[:, None], column[None]]
  plt.store(where, result.astype(out.dtype), mask=live & inside[None])


def _iota(size):
  return jnp.arange(size, dtype=jnp.int32)


def _within(index, size, block):
  """Indices that exist, contiguous wherever the block divides the size."""
  return index if size % block == 0 else jnp.minimum(index, size - 1)


def _dot(left, right):
  """A product in float32; float32 factors are not rounded to TF32."""
  precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  return jnp.dot(
    left, right.astype(left.dtype), precision=precision, preferred_element_type=jnp.float32
  )
