"""The canvas: fixed-width rows of given text, MASK where something is to be written, and padding.

Prompts are padded on the left, so that the written region of every row is the same columns.
Infilling pads on the right, so that a block is the same stretch of every row. In both, positions
count from 0 at the first real token and padding has segment 0: a network that respects them gives
a row the answer it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from lladax.types import Positions, SegmentIds, Tokens


@struct.dataclass
class Canvas:
  """What the sampler starts from. Given tokens never change; a MASK is a place to write.

  Attributes:
    tokens: int32[B, L]. positions: int32[B, L]. segment_ids: int32[B, L], 1, and 0 on padding.
  """

  tokens: Tokens
  positions: Positions
  segment_ids: SegmentIds


def prompt_canvas(
  prompts: Sequence[Sequence[int]],
  gen_length: int,
  *,
  mask_id: int,
  pad_id: int,
  max_length: int | None = None,
  multiple: int = 32,
) -> Canvas:
  """Prompts right-aligned in columns [0, P), `gen_length` MASKs in [P, P + gen_length).

  P is the longest prompt rounded up to `multiple`, so that calls with prompts of similar length
  share a compilation, but at most max_length - gen_length.

  Raises:
    ValueError: no prompts; a prompt that contains MASK or a negative id; a prompt that leaves no
      room for `gen_length` tokens within `max_length`; `pad_id` equal to `mask_id`.
  """
  rows = check_rows(prompts, mask_id=mask_id, pad_id=pad_id)
  longest = max(len(row) for row in rows)
  for index, row in enumerate(rows):
    if mask_id in row:
      raise ValueError(
        f"prompt {index} contains MASK (id {mask_id}) at position {list(row).index(mask_id)}; "
        "a prompt is given text: use infill to have masks filled"
      )
    if max_length is not None and len(row) + gen_length > max_length:
      raise ValueError(
        f"prompt {index} has {len(row)} tokens and gen_length is {gen_length}; together they "
        f"exceed the context of {max_length}: shorten the prompt to at most "
        f"{max(max_length - gen_length, 0)} tokens or lower gen_length"
      )
  width = -(-longest // multiple) * multiple
  if max_length is not None:
    width = min(width, max_length - gen_length)
  tokens = np.full((len(rows), width + gen_length), pad_id, np.int32)
  tokens[:, width:] = mask_id
  for row, line in zip(rows, tokens, strict=True):
    line[width - len(row) : width] = row
  padding = width - np.array([[len(row)] for row in rows], np.int32)  # [B, 1]
  return place(tokens, np.arange(width + gen_length, dtype=np.int32) - padding)


def masked_canvas(
  rows: Sequence[Sequence[int]],
  *,
  mask_id: int,
  pad_id: int,
  max_length: int | None = None,
  multiple: int = 32,
  block_length: int | None = None,
) -> Canvas:
  """Rows with MASK anywhere, padded on the right to a multiple of `multiple` (of the block).

  Raises:
    ValueError: no rows; a row that is empty, longer than `max_length` or holds a negative id;
      `pad_id` equal to `mask_id`.
  """
  rows = check_rows(rows, mask_id=mask_id, pad_id=pad_id)
  for index, row in enumerate(rows):
    if not row:
      raise ValueError(f"row {index} is empty; a row to infill has at least one token or MASK")
    if max_length is not None and len(row) > max_length:
      raise ValueError(
        f"row {index} has {len(row)} tokens, more than the context of {max_length}: shorten it"
      )
  lengths = np.array([[len(row)] for row in rows], np.int32)  # [B, 1]
  step = block_length or multiple
  width = -(-int(lengths.max()) // step) * step
  if max_length is not None and block_length is None:
    width = min(width, max_length)
  tokens = np.full((len(rows), width), pad_id, np.int32)
  for row, line in zip(rows, tokens, strict=True):
    line[: len(row)] = row
  columns = np.arange(width, dtype=np.int32)
  return place(tokens, np.where(columns < lengths, columns, -1))


def check_rows(rows, *, mask_id: int, pad_id: int) -> list[list[int]]:
  if pad_id == mask_id:
    raise ValueError(f"pad_id and mask_id are both {mask_id}; padding would be taken for MASK")
  rows = [[int(token) for token in row] for row in rows]
  if not rows:
    raise ValueError("there are no rows to fill: give at least one, [[]] for an empty canvas")
  for index, row in enumerate(rows):
    if any(token < 0 for token in row):
      raise ValueError(f"row {index} holds a negative id, {min(row)}; ids count from 0")
  return rows


def place(tokens: np.ndarray, positions: np.ndarray) -> Canvas:
  """Negative positions are padding: segment 0, and position 0 so that it stays in the context."""
  return Canvas(
    tokens=tokens,
    positions=np.maximum(positions, 0).astype(np.int32),
    segment_ids=(positions >= 0).astype(np.int32),
  )


def window(x: jax.Array, column: int | jax.Array, width: int) -> jax.Array:
  """Columns [column, column + width) of [B, L, ...]; `column` may be traced."""
  return jax.lax.dynamic_slice_in_dim(x, column, width, axis=1)
