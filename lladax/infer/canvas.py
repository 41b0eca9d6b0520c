"""The canvas: fixed-width rows of given text, MASK where something is to be written, and padding.

Rows are padded on the right, so that a token's position is its column; padding has segment 0, and a
network that respects it gives a row the answer it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from lladax.types import SegmentIds, Tokens


@struct.dataclass
class Canvas:
  """What the sampler starts from. Given tokens never change; a MASK is a place to write.

  Attributes:
    tokens: int32[B, S].
    segment_ids: int32[B, S], 1, and 0 on padding.
    first: int32[B], the column after the prompt.
    column: int32[B], where the first block begins.
    end: int32[B], the column after the last one to be written.
  """

  tokens: Tokens
  segment_ids: SegmentIds
  first: jax.Array
  column: jax.Array
  end: jax.Array

  def num_blocks(self, width: int) -> int:
    """Blocks of the row that has most."""
    return int(np.max(-(-(np.asarray(self.end) - np.asarray(self.column)) // width), initial=0))


def prompt_canvas(
  prompts: Sequence[Sequence[int]],
  gen_length: int | Sequence[int],
  *,
  mask_id: int,
  pad_id: int,
  block_length: int = 1,
  align: bool = False,
  max_length: int | None = None,
  multiple: int = 32,
) -> Canvas:
  """Prompts, each with MASKs after it.

  The width is a multiple of `multiple` with room for whole blocks, so that calls with prompts of
  similar length share a compilation.

  Args:
    prompts: ids, of any lengths.
    gen_length: MASKs after each, one number for all or one for each.
    block_length: W.
    align: whether the first block begins at a multiple of W, with the end of the prompt in it.
    max_length: of a prompt with what is written after it.

  Raises:
    ValueError: no prompts; a prompt that contains MASK or a negative id; a prompt that leaves no
      room for `gen_length` tokens within `max_length`; `pad_id` equal to `mask_id`.
  """
  rows = check_rows(prompts, mask_id=mask_id, pad_id=pad_id)
  wanted = [gen_length] * len(rows) if isinstance(gen_length, int) else list(gen_length)
  for index, (row, length) in enumerate(zip(rows, wanted, strict=True)):
    if mask_id in row:
      raise ValueError(
        f"prompt {index} contains MASK (id {mask_id}) at position {list(row).index(mask_id)}; "
        "a prompt is given text: use infill to have masks filled"
      )
    if max_length is not None and len(row) + length > max_length:
      raise ValueError(
        f"prompt {index} has {len(row)} tokens and gen_length is {length}; together they "
        f"exceed the context of {max_length}: shorten the prompt to at most "
        f"{max(max_length - length, 0)} tokens or lower gen_length"
      )
  first = [len(row) for row in rows]
  column = [start // block_length * block_length if align else start for start in first]
  filled = [row + [mask_id] * length for row, length in zip(rows, wanted, strict=True)]
  return lay_out(filled, first, column, pad_id, block_length, multiple, max_length)


def masked_canvas(
  rows: Sequence[Sequence[int]],
  *,
  mask_id: int,
  pad_id: int,
  block_length: int = 1,
  max_length: int | None = None,
  multiple: int = 32,
) -> Canvas:
  """Rows with MASK anywhere; blocks are counted from their start.

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
  zeros = [0] * len(rows)
  return lay_out(rows, zeros, zeros, pad_id, block_length, multiple, max_length)


def lay_out(
  rows: list[list[int]], first, column, pad_id: int, width: int, multiple: int, most: int | None
) -> Canvas:
  """Rows with their last block whole, padded to a multiple of `multiple` or to `most` columns."""
  ends = [len(row) for row in rows]
  whole = max(
    start - (start - end) // width * width for start, end in zip(column, ends, strict=True)
  )
  length = -(-max(whole, 1) // multiple) * multiple
  if most is not None:
    length = max(whole, min(length, most))
  tokens = np.full((len(rows), length), pad_id, np.int32)
  for row, line in zip(rows, tokens, strict=True):
    line[: len(row)] = row
  lengths = np.asarray(ends, np.int32)
  return Canvas(
    tokens=tokens,
    segment_ids=(np.arange(length) < lengths[:, None]).astype(np.int32),
    first=np.asarray(first, np.int32),
    column=np.asarray(column, np.int32),
    end=lengths,
  )


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
