"""Tiles of the TPU kernels: by shape, dtype, and the vector memory and cores of the target."""

from __future__ import annotations

import jax.numpy as jnp

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
    if gradient_bytes(tile, part, columns, dtype, out_dtype) <= SHARE * op.chip().vmem
  ]
  # Bytes of rows read per output element; among equals the one with more columns.
  part, columns = min(sizes, key=lambda size: (1 / size[0] + 1 / size[1], -size[1]))
  return Tiling(rows=tile, columns=columns, depth=part, step=step)


def candidates(shape: tuple[int, int, int, int], dtype) -> tuple[Tiling, ...]:
  """Tilings worth timing for (R, E, D, F), for all passes: the default aside, those that may fit.

  Products have no use for a depth (0), which in the weight gradient is the rows of a tile of it.
  """
  rows, _, depth, width = shape
  sides = sorted({min(width, c) for c in (256, 512, 1024, 2048)})
  parts = sorted({min(depth, d) for d in (512, 1024, 2048)})
  return tuple(
    Tiling(rows=tile, columns=columns, depth=part, step=step)
    for tile in (128, 256, 512, 1024)
    for step in (128, 256, 512)
    for columns in sides
    for part in (0, *parts)
    if step <= tile <= max(rows, 128)
    and gradient_bytes(tile, part or 128, columns, dtype, dtype) <= op.chip().vmem
  )


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
  needed = product_bytes(rows, step, depth, columns, dtype, parts=parts, outputs=outputs)
  return weights <= WEIGHT_BLOCK and needed <= SHARE * op.chip().vmem


def product_bytes(rows, step, depth, columns, dtype, *, parts, outputs):
  """Two buffers of every block, and float32 results of a step before and after they are stored."""
  blocks = rows * depth + parts * depth * columns + outputs * rows * columns
  return 2 * jnp.dtype(dtype).itemsize * blocks + 8 * parts * step * columns


def gradient_bytes(rows, depth, columns, dtype, out_dtype):
  """Two buffers of every block, the float32 sum, and one product that is added to it."""
  size, out_size = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize
  return 2 * size * rows * (depth + columns) + (8 + 2 * out_size) * depth * columns


def vmem_limit(needed):
  """Vector memory to ask for: what the blocks need and a quarter more, for the compiler."""
  return int(min(op.chip().vmem, max(needed * 1.25 + (4 << 20), 16 << 20)))
