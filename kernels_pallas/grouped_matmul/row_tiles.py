"""Which rows a GPU block computes: tiles that start at their group's first row.

A tile never spans two groups, so that each multiplies by one matrix; the tile that ends a group
reaches into the rows of the next, which it computes and does not store.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowTiles(NamedTuple):
  """Per tile, int32[tiles]: computes rows [start, start + block), owns rows [low, high)."""

  group: jax.Array  # E: the rows beyond the last group, which are zero
  start: jax.Array
  low: jax.Array
  high: jax.Array  # low where there is nothing to do


def row_tiles(group_sizes: jax.Array, rows: int, block: int, align: int = 1) -> RowTiles:
  """Cuts R rows into tiles; those that are not needed for these sizes come last.

  Args:
    group_sizes: int32[E], adding up to at most R.
    rows: R.
    block: rows of a tile.
    align: tiles start at multiples of it, taking up to align - 1 rows of the group before along.
  """
  group_sizes = group_sizes.astype(jnp.int32)
  rest = rows - group_sizes.sum(dtype=jnp.int32)
  sizes = jnp.concatenate([group_sizes, rest[None]])
  ends = jnp.cumsum(sizes)
  firsts = ends - sizes
  aligned = firsts // align * align
  counts = jnp.where(sizes > 0, -(-(ends - aligned) // block), 0)
  last_tiles = jnp.cumsum(counts)
  tile = jnp.arange(tile_count(group_sizes.shape[0], rows, block, align), dtype=jnp.int32)
  group = (tile[:, None] >= last_tiles).sum(1, dtype=jnp.int32)
  used = group < sizes.shape[0]
  group = jnp.minimum(group, sizes.shape[0] - 1)
  start = aligned[group] + block * (tile - (last_tiles - counts)[group])
  low, high = jnp.maximum(start, firsts[group]), jnp.minimum(start + block, ends[group])
  return RowTiles(group, *(jnp.where(used, x, 0) for x in (start, low, high)))


def tile_count(groups: int, rows: int, block: int, align: int = 1) -> int:
  """Tiles that suffice for R rows in E groups and a rest, however their sizes fall."""
  groups = min(groups + 1, rows)  # of the nonempty ones, the rest included
  return (rows + groups * (block + align - 2)) // block
