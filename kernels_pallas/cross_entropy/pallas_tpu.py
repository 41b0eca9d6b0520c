"""Cross-entropy for TPUs: logits never leave the chip, and rows without a weight are not computed.

Two kernels. The first visits, for a tile of rows, all tiles of the vocabulary with a running
softmax, as flash attention does with keys: the kernel's columns are keys and, transposed, values.
So one reading gives the norms and sum_v p_v W_v, the first part of the gradient of the hidden
states. Its second part, the target's column, needs a product with a one-hot matrix; as rows are
sorted by target, few pairs of tiles have any target in common (at most their numbers' sum, not
product), and only those are multiplied. The second kernel visits, for a tile of the vocabulary,
all tiles of rows, computes their logits again, and sums the gradient of its columns on the chip.

Four products instead of the three of `row_blocks`, and the faster form by peak rates. For 8192
rows, D = 2048, V = 157184, bfloat16, `row_blocks` of b rows takes 15.8 TFLOP and moves, by XLA's
cost model, 26 GB for logits and 4 GB for the matrix and its float32 gradient with each block: 57 GB
at b = 1024, beside 2.5 GB of memory. Its loops over logits wait for memory, its products do not: 34
+ 21 ms on a v5p, 80 + 70 ms on a v5e, 17 + 35 ms on a v6e. The kernels here take 21.1 TFLOP; the
first reads the matrix once per 512 rows, 10 GB, the second the rows, also transposed, once per 512
columns, 22 GB, both while they multiply: 46, 107 and 25 ms (on a v6e the second waits for memory),
and 0.1 GB of memory. (Arithmetic and ahead-of-time compilation, not timed.)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import op

LARGEST_TILE = 512
LEAST_COLUMNS = 256  # narrower tiles multiply too little per byte of the rows they read
SHARE = 0.7  # of the vector memory; the rest is for what the compiler keeps


def refusal(hidden, kernel) -> str | None:
  """Why the kernels cannot take these operands; None if they can."""
  width, vocabulary = kernel.shape
  if hidden.dtype not in (jnp.bfloat16, jnp.float32) or kernel.dtype != hidden.dtype:
    return f"it takes bfloat16 or float32, not {hidden.dtype} and {kernel.dtype}"
  if _columns(vocabulary) is None:
    return (
      f"it takes a vocabulary with a divisor among the multiples of 128 from {LEAST_COLUMNS} to "
      f"{LARGEST_TILE}, not {vocabulary}"
    )
  if _rows(LARGEST_TILE, width, vocabulary, hidden.dtype) is None:
    return f"tiles of {width} numbers of {hidden.dtype} do not fit the chip"
  return None


def visit(hidden, kernel, targets, weights, *, with_gradient, interpret=False):
  """See `row_blocks.visit`."""
  T, width = hidden.shape
  columns = _columns(kernel.shape[1])
  tile = _rows(T, width, kernel.shape[1], hidden.dtype)
  rows = -(-T // tile) * tile
  counted = weights != 0
  # Rows with a weight first, by target: V stands behind every word.
  keys = jnp.where(counted, jnp.clip(targets, 0, kernel.shape[1] - 1), kernel.shape[1])
  order = jnp.argsort(keys)
  padded = jnp.pad(order, (0, rows - T), constant_values=T)  # read as the last row, weight 0
  keys = keys.at[padded].get(mode="fill", fill_value=kernel.shape[1]).astype(jnp.int32)
  weight = weights.at[padded].get(mode="fill", fill_value=0)
  x = hidden.at[padded].get(mode="clip")
  tiles = keys.reshape(-1, tile)
  last = jnp.where(tiles < kernel.shape[1], tiles, -1).max(1)
  live = (counted.sum(dtype=jnp.int32)[None] + tile - 1) // tile
  make = functools.partial(_Call, tile, columns, interpret=interpret)
  with jax.named_scope("cross_entropy_blocks"):
    column = keys[:, None], weight[:, None]
    scalars = live, tiles[:, 0], last
    nll, log_norm, *dhidden = make(x, kernel).softmax(scalars, x, kernel, *column, with_gradient)
    if with_gradient:
      # Lying down they are small to fetch. Words as float32: exact below 2**24.
      lying = jnp.stack([keys.astype(jnp.float32), weight, log_norm[:, 0]])
      lying = jnp.pad(lying, [(0, 5), (0, 0)])
      dkernel = make(x, kernel).kernel_gradient(live, x, kernel, lying)
  inverse = jnp.zeros(T, jnp.int32).at[order].set(jnp.arange(T, dtype=jnp.int32))
  nll = nll[:, 0]
  gradients = (dhidden[0][inverse], dkernel) if with_gradient else ()
  return jnp.vdot(weight, nll), nll[inverse], gradients


def _columns(vocabulary: int) -> int | None:
  """Columns of a tile: the largest that divides the vocabulary."""
  sizes = range(LARGEST_TILE, LEAST_COLUMNS - 1, -128)
  return next((size for size in sizes if vocabulary % size == 0), None)


def _rows(rows: int, width: int, vocabulary: int, dtype) -> int | None:
  """Rows of a tile: the most that fit, and no more than there are."""
  columns, size = _columns(vocabulary), jnp.dtype(dtype).itemsize
  for tile in (LARGEST_TILE, LARGEST_TILE // 2, 128):
    if tile >= 2 * rows and tile > 128:
      continue
    if max(_vmem(tile, columns, width, size)) <= SHARE * op.chip().vmem:
      return tile
  return None


def _vmem(tile, columns, width, size):
  """Bytes that each of the two kernels holds: operands and results twice, as they are copied."""
  scores = 5 * tile * columns * 4
  softmax = 2 * size * width * (2 * tile + columns) + 8 * tile * width + scores
  gradient = 2 * size * width * (2 * tile + 2 * columns) + 4 * columns * width + scores
  return softmax, gradient


class _Call:
  """The two kernels for tiles of one size."""

  def __init__(self, tile, columns, x, kernel, *, interpret):
    self.tile, self.columns, self.interpret = tile, columns, interpret
    (self.rows, self.width), self.vocabulary = x.shape, kernel.shape[1]
    self.row_tiles, self.column_tiles = self.rows // tile, self.vocabulary // columns
    self.dtype = x.dtype

  def softmax(self, scalars, x, kernel, keys, weights, with_gradient):
    """nll and log of the norm, float32[rows, 1]; with gradient also that of x [rows, D]."""
    tile, columns, width = self.tile, self.columns, self.width
    nth = functools.partial(_interleaved, self.row_tiles)

    def row(i, j, *scalars):
      return nth(i), 0

    def live_row(i, j, live, *scalars):
      return jnp.minimum(nth(i), jnp.maximum(live[0] - 1, 0)), 0

    def column(i, j, live, *scalars):  # where nothing is computed, nothing is fetched
      return 0, jnp.where(nth(i) < live[0], j, self.column_tiles - 1)

    narrow, wide = pl.BlockSpec((tile, 1), row), pl.BlockSpec((tile, width), row)
    outs = [self._out((self.rows, 1), jnp.float32, x, kernel, weights) for _ in range(2)]
    out_specs = [narrow, narrow]
    scratch = [pltpu.VMEM((tile, 1), jnp.float32) for _ in range(3)]
    if with_gradient:
      outs.append(self._out(x.shape, x.dtype, x, kernel, weights))
      out_specs.append(wide)
      scratch += [pltpu.VMEM((tile, width), jnp.float32) for _ in range(2)]
    products = 2 if with_gradient else 1
    return self._call(
      functools.partial(_softmax_kernel, nth, with_gradient=with_gradient),
      (self.row_tiles, self.column_tiles),
      products,
      self.row_tiles * self.vocabulary + 2 * self.rows,
      scalars=scalars,
      operands=(x, kernel, keys, weights),
      in_specs=[
        pl.BlockSpec((tile, width), live_row),
        pl.BlockSpec((width, columns), column),
        narrow,
        narrow,
      ],
      out_specs=out_specs,
      out_shape=outs,
      scratch_shapes=scratch,
    )

  def kernel_gradient(self, live, x, kernel, lying):
    """[D, V]. lying: float32[8, rows]; words, weights and logs of the norm."""
    tile, columns, width = self.tile, self.columns, self.width

    def live_tile(i, live):
      return jnp.minimum(i, jnp.maximum(live[0] - 1, 0))

    def across(j, i, live):
      return 0, live_tile(i, live)

    column = pl.BlockSpec((width, columns), lambda j, *_: (0, j))
    (gradient,) = self._call(
      _gradient_kernel,
      (self.column_tiles, self.row_tiles),
      2,
      2 * self.column_tiles * self.rows + 2 * self.vocabulary,
      scalars=(live,),
      # The rows are given transposed, too: as a left factor the unit wants them so.
      operands=(x, x.T, kernel, lying),
      in_specs=[
        pl.BlockSpec((tile, width), lambda *args: across(*args)[::-1]),
        pl.BlockSpec((width, tile), across),
        column,
        pl.BlockSpec((8, tile), across),
      ],
      out_specs=[column],
      out_shape=[self._out(kernel.shape, kernel.dtype, x, kernel, lying)],
      scratch_shapes=[pltpu.VMEM((width, columns), jnp.float32)],
    )
    return gradient

  def _out(self, shape, dtype, *references):
    return op.shape_like(shape, dtype, *references)

  def _call(self, body, grid, products, moved, *, scalars, operands, **specs):
    """`moved`: vectors of D numbers read and written."""
    out_shape = specs.pop("out_shape")
    scores = self.rows * self.vocabulary
    # As if every row had a weight.
    cost = pl.CostEstimate(
      flops=2 * products * scores * self.width,
      transcendentals=scores,
      bytes_accessed=self.dtype.itemsize * self.width * moved,
    )
    with op.for_target():
      return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(scalars), grid=grid, **specs
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=int(0.9 * op.chip().vmem),
        ),
        cost_estimate=cost,
        interpret=self.interpret,
      )(*scalars, *operands)


def _interleaved(tiles, i):
  """The i-th tile to be visited. Two cores halve the grid: each shall get every other tile.

  Otherwise one of them would get all those without a weight.
  """
  if op.chip().cores != 2 or tiles % 2:
    return i
  return 2 * (i % (tiles // 2)) + i // (tiles // 2)


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _dot_transposed(a, b):
  """[m, k] x [n, k] -> [m, n]."""
  return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _hot(keys, j, shape):
  return j * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1) == keys


def _softmax_kernel(
  nth, live, first, last, x, kernel, keys, weights, nll, log_norm, *refs, with_gradient
):
  (dhidden, *refs) = refs if with_gradient else (None, *refs)
  peak, norm, picked, *sums = refs
  i, j = nth(pl.program_id(0)), pl.program_id(1)
  columns = kernel.shape[1]

  @pl.when(j == 0)
  def _():
    peak[...] = jnp.full_like(peak, jnp.finfo(jnp.float32).min)
    for ref in (norm, picked, *sums):
      ref[...] = jnp.zeros_like(ref)

  @pl.when(i < live[0])
  def _():
    logits = _dot(x[...], kernel[...])
    before = peak[...]
    peak[...] = jnp.maximum(before, logits.max(-1, keepdims=True))
    shrink = jnp.exp(before - peak[...])
    exps = jnp.exp(logits - peak[...])
    norm[...] = shrink * norm[...] + exps.sum(-1, keepdims=True)
    if with_gradient:
      sums[0][...] = shrink * sums[0][...] + _dot_transposed(exps.astype(kernel.dtype), kernel[...])

    @pl.when((first[i] < (j + 1) * columns) & (last[i] >= j * columns))
    def _():
      hot = _hot(keys[...], j, logits.shape)
      picked[...] += jnp.where(hot, logits, 0).sum(-1, keepdims=True)
      if with_gradient:
        sums[1][...] += _dot_transposed(hot.astype(kernel.dtype), kernel[...])

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    counts = weights[...] != 0  # elsewhere the norm may be 0, and its logarithm and inverse nothing
    divisor = jnp.where(norm[...] > 0, norm[...], 1)
    log_norm[...] = jnp.log(divisor) + peak[...]
    nll[...] = jnp.where(counts, log_norm[...] - picked[...], 0)
    if with_gradient:
      gradient = weights[...] * (sums[0][...] / divisor - sums[1][...])
      dhidden[...] = gradient.astype(dhidden.dtype)


def _gradient_kernel(live, x, x_transposed, kernel, lying, out, total):
  j, i = pl.program_id(0), pl.program_id(1)

  @pl.when(i == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  @pl.when(i < live[0])
  def _():
    standing = jnp.swapaxes(lying[...], 0, 1)
    keys, weight, log_norm = (standing[:, n : n + 1] for n in range(3))
    logits = _dot(x[...], kernel[...])
    dlogits = jnp.exp(logits - log_norm) * weight
    dlogits -= jnp.where(_hot(keys.astype(jnp.int32), j, logits.shape), weight, 0)
    total[...] += _dot(x_transposed[...], dlogits.astype(kernel.dtype))

  @pl.when(i == pl.num_programs(1) - 1)
  def _():
    out[...] = total[...].astype(out.dtype)
