"""What tokens read before they gave way to others, where a sampler edits what it has written.

`tokens` and `revealed_at` say what a text reads in the end and since when. Together with what is here
they say what was there before any iteration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lladax.infer.text_stream import Decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Earlier:
  """A token that did not stay.

  Attributes:
    place: which token of those it is told with, from 0.
    at: in which iteration of the row it was written, from 0.
    token: its id; None where the place was masked again.
    confidence: with which it was written.
  """

  place: int
  at: int
  token: int | None
  confidence: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlierText:
  """What such a token reads by itself; the rest as for `Earlier`."""

  place: int
  at: int
  text: str | None
  confidence: float

  def to_tree(self) -> dict:
    """Plain JSON values, as the player reads them."""
    return {**vars(self), "confidence": round(self.confidence, 4)}


class Shown(NamedTuple):
  """What a place shows: its text, the iteration that wrote it (-1: given), its confidence."""

  text: str
  at: int
  confidence: float


def earlier_tokens(
  tokens: np.ndarray,
  confidence: np.ndarray,
  revealed_at: np.ndarray,
  *,
  first: int,
  mask_id: int,
) -> list[Earlier]:
  """What did not stay in a block, by iteration.

  Args:
    tokens: int32[n, W], the block after each of n iterations.
    confidence: float32[n, W], with which they were written.
    revealed_at: int32[W], the iterations that wrote what stayed; -1 for what was given.
    first: the iteration of the row that the first of these is.
    mask_id: the id that stands for MASK.
  """
  if not len(tokens):
    return []
  start = np.where(revealed_at < 0, tokens[:1], mask_id)
  changed = tokens != np.concatenate([start, tokens[:-1]])
  at = first + np.arange(len(tokens))[:, None]
  return [
    Earlier(
      place=int(place),
      at=int(first + number),
      token=None if tokens[number, place] == mask_id else int(tokens[number, place]),
      confidence=float(confidence[number, place]),
    )
    for number, place in np.argwhere(changed & (at < revealed_at))
  ]


def earlier_texts(
  earlier: Iterable[Earlier], decode: Decode, *, skip: int = 0, count: int | None = None
) -> list[EarlierText]:
  """Of `count` places from `skip` on, counted from there; of all that follow without a count."""
  return [
    EarlierText(
      place=one.place - skip,
      at=one.at,
      text=None if one.token is None else decode([one.token]),
      confidence=one.confidence,
    )
    for one in earlier
    if one.place >= skip and (count is None or one.place < skip + count)
  ]


def shown(
  texts: Sequence[str],
  revealed_at: Sequence[int],
  confidence: Sequence[float],
  number: int,
  earlier: Iterable[EarlierText] = (),
) -> list[Shown | None]:
  """What each place shows before iteration `number`; None for a mask.

  `earlier` is ordered by iteration. The rest are what stays, place by place.
  """
  before = {one.place: one for one in earlier if one.at < number}  # the last one of each place
  found: list[Shown | None] = []
  for place, final in enumerate(map(Shown, texts, revealed_at, confidence)):
    one = before.get(place)
    if final.at < number:
      found.append(final)
    elif one is None or one.text is None:
      found.append(None)
    else:
      found.append(Shown(one.text, one.at, one.confidence))
  return found
