"""Keys and values of a canvas, kept from one pass to the next: the mechanics; when is a policy's.

A pass over a window of columns computes the keys and values of these columns and reads those of the
others from memory. With bidirectional attention what is kept is an approximation as soon as any
token changes (dual and prefix cache of Fast-dLLM, arXiv 2505.22618); with block-causal attention the
blocks before are exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from lladax.sharding import constrain

# Logical names of the axes [B, S, K, H]: how the memory of a layer lies on a mesh.
MEMORY_AXES = ("batch", None, "heads", None)


@struct.dataclass
class KeyValues:
  """Rotated keys and values.

  Attributes:
    key, value: [B, S, K, H] of a layer, [n, B, S, K, H] of a stack of layers.
  """

  key: jax.Array
  value: jax.Array


@struct.dataclass
class Memory:
  """Of all layers; None for layers that the model does not have.

  Attributes:
    dense_layers, layers: one stack, or where the model's layers are not stacked a tuple of as many.
      Apart, each is updated in place; a stack is copied layer by layer, as its weights are.
  """

  dense_layers: KeyValues | tuple[KeyValues, ...] | None
  layers: KeyValues | tuple[KeyValues, ...] | None


@struct.dataclass
class Place:
  """Where the columns of a pass lie among those of the canvas, and what becomes of their keys.

  Attributes:
    start: int32[B], the first column of each row; None for a pass over all of them.
    first, end: int32[B] or None: of the columns of the pass, those in [first, end) replace what is
      in memory; the others are computed against it and leave it as it is. None: all of them.
    rows: bool[B] or None: the rows whose memory changes; None: all of them.
  """

  start: jax.Array | None = None
  first: jax.Array | None = None
  end: jax.Array | None = None
  rows: jax.Array | None = None


@struct.dataclass
class Columns:
  """Columns of [B, L, ...]: in each row r, `size` of them from start_r on.

  Attributes:
    start: int32[B].
    size: W.
  """

  start: jax.Array
  size: int = struct.field(pytree_node=False)

  def take(self, x: jax.Array) -> jax.Array:
    return take_columns(x, self.start, self.size)


def take_columns(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """Columns [start_r, start_r + size) of each row r of [B, S, ...]; start is clipped to fit."""

  def of_row(row, first):
    return jax.lax.dynamic_slice_in_dim(row, first, size, axis=0)

  return jax.vmap(of_row)(x, start)


def put_columns(x: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """[B, S, ...] with columns [start_r, start_r + W) of each row r replaced by `new` [B, W, ...]."""

  def of_row(row, new_row, first):
    return jax.lax.dynamic_update_slice_in_dim(row, new_row, first, axis=0)

  return jax.vmap(of_row)(x, new.astype(x.dtype), start)


def insert(memory: KeyValues, new: KeyValues, place: Place) -> KeyValues:
  """A layer's memory [B, S, K, H] with the columns of this pass [B, L, K, H] in it."""

  def put(old, fresh):
    size = fresh.shape[1]
    before = take_columns(old, place.start, size)
    if place.first is not None:
      columns = place.start[:, None] + jnp.arange(size)
      inside = (columns >= place.first[:, None]) & (columns < place.end[:, None])
      fresh = jnp.where(inside[..., None, None], fresh, before)
    if place.rows is not None:
      fresh = jnp.where(place.rows[:, None, None, None], fresh, before)
    return constrain(put_columns(old, fresh, place.start), *MEMORY_AXES)

  return jax.tree.map(put, memory, new)


def select_rows(rows: jax.Array, yes: Memory, no: Memory) -> Memory:
  """The memory `yes` in the rows where bool[B] says so, `no` in the others."""

  def select(a, b):
    lead = (1,) * (a.ndim - 4)  # of a stack
    return jnp.where(rows.reshape(*lead, -1, 1, 1, 1), a, b)

  return jax.tree.map(select, yes, no)
