"""Rows on their way from a canvas to a text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lladax.infer.canvas import Canvas
from lladax.types import BoolPerToken, PerToken, SegmentIds, Tokens


@struct.dataclass
class History:
  """The last block of each row after each of its iterations.

  Attributes:
    tokens: int32[iterations, B, W].
    confidence: float32[iterations, B, W].
  """

  tokens: jax.Array
  confidence: jax.Array


@struct.dataclass
class State:
  """Rows that are decoded together, each at a place of its own. A row's position is its column.

  Attributes:
    tokens: int32[B, S].
    segment_ids: int32[B, S], 1, and 0 on padding.
    given: bool[B, S], text that never changes.
    first: int32[B], the column after the prompt.
    column: int32[B], where the next block begins.
    end: int32[B], the column after the last one that is written. A row is done when its column has
      reached it.
    keys: [B], of the rows.
    block: int32[B], blocks behind.
    revealed_at: int32[B, S]. In which iteration of its row, from 0, a token was written (the last
      time); -1 for what was given, for padding and for what is still masked.
    confidence: float32[B, S]. With which confidence it was written; 0 where nothing was.
    iterations: int32[B]. Iterations in which the row had something to write. Those that its
      neighbours needed are not counted, so the number does not depend on them.
    nfe: int32[B], passes of the network that the row needed.
    temperature, top_p: float32[B], what tokens of the row are drawn with; None where they are not.
    memory: keys and values, of twice the rows with guidance; None before the first pass that keeps
      them, and without a cache.
    soft: [B, S, D], what smoothing adds to the embeddings of masks; None without.
    history: of the last block; None where tokens are written once, and `revealed_at` says all.
  """

  tokens: Tokens
  segment_ids: SegmentIds
  given: BoolPerToken
  first: jax.Array
  column: jax.Array
  end: jax.Array
  keys: jax.Array
  block: jax.Array
  revealed_at: jax.Array
  confidence: PerToken
  iterations: jax.Array
  nfe: jax.Array
  memory: Any
  temperature: jax.Array | None = None
  top_p: jax.Array | None = None
  soft: jax.Array | None = None
  history: History | None = None

  @property
  def positions(self) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(self.tokens.shape[1]), self.tokens.shape)


def start_state(
  canvas: Canvas,
  keys: jax.Array,
  *,
  mask_id: int,
  temperature: float | None = None,
  top_p: float | None = None,
  memory: Any = None,
  soft: Any = None,
) -> State:
  """Rows before their first block; `temperature` and `top_p` as in `SamplerConfig.drawing`."""
  tokens = np.asarray(canvas.tokens)
  shape, rows = tokens.shape, tokens.shape[0]
  zeros = np.zeros(rows, np.int32)
  state = State(
    tokens=tokens,
    segment_ids=canvas.segment_ids,
    given=(tokens != mask_id) & (np.asarray(canvas.segment_ids) != 0),
    first=canvas.first,
    column=canvas.column,
    end=canvas.end,
    keys=keys,
    block=zeros,
    revealed_at=np.full(shape, -1, np.int32),
    confidence=np.zeros(shape, np.float32),
    iterations=zeros,
    nfe=zeros,
    temperature=None if temperature is None else np.full(rows, temperature, np.float32),
    top_p=None if top_p is None else np.full(rows, top_p, np.float32),
    memory=memory,
    soft=soft,
  )
  return jax.tree.map(lambda x: jnp.array(x), state)
