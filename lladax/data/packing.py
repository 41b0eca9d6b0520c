"""Strategies that make rows of a stream of documents, with little of it in memory.

Both close every document with end of text and keep documents in a row apart as segments; they
differ in what they cut and what they pad.
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# int32[n] tokens of a row, and the lengths of its segments; n may be below L only where rows pad.
PackedRow = tuple[np.ndarray, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Packing(abc.ABC):
  """Makes rows of documents; a function of the documents and their order only."""

  @abc.abstractmethod
  def rows(self, documents: Iterable[np.ndarray], length: int) -> Iterator[PackedRow]:
    """Rows of at most `length` tokens that hold every token of every document once.

    Args:
      documents: int32[n] tokens of each, its end of text included; n is at least 1.
    """


@dataclasses.dataclass(frozen=True)
class Stream(Packing):
  """Documents end to end, cut every L tokens (LLaDA, arXiv 2502.09992): padding in the last row.

  A document that crosses the end of a row goes on in the next one as a segment of its own.
  """

  def rows(self, documents, length):
    parts, lengths, room = [], [], length
    for document in documents:
      while len(document):
        piece, document = document[:room], document[room:]
        parts.append(piece)
        lengths.append(len(piece))
        room -= len(piece)
        if not room:
          yield np.concatenate(parts), lengths
          parts, lengths, room = [], [], length
    if parts:
      yield np.concatenate(parts), lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestFit(Packing):
  """No document is cut that fits a row: each goes where the least room stays (arXiv 2404.10830).

  Documents above L tokens are cut into rows and a rest. Within a window of documents, longest
  first, a piece joins the row with the least room that is enough. Row order follows the oldest
  document of a row.

  Attributes:
    window: rows' worth of tokens that are packed at a time; more waste less and take more memory.
  """

  window: int = 2048

  def __post_init__(self):
    if self.window < 1:
      raise ValueError(f"window is at least 1 row, got {self.window}")

  def rows(self, documents, length):
    waiting, tokens = [], 0
    for document in documents:
      for start in range(0, len(document), length):
        waiting.append(document[start : start + length])
      tokens += len(document)
      if tokens >= self.window * length:
        yield from _best_fit(waiting, length)
        waiting, tokens = [], 0
    yield from _best_fit(waiting, length)


def _best_fit(pieces: Sequence[np.ndarray], length: int) -> Iterator[PackedRow]:
  bins: list[list[int]] = []
  rooms: list[tuple[int, int]] = []  # (room, bin), increasing
  order = sorted(range(len(pieces)), key=lambda i: (-len(pieces[i]), i))
  for index in order:
    size = len(pieces[index])
    at = bisect.bisect_left(rooms, (size, -1))
    if at < len(rooms):
      room, number = rooms.pop(at)
      bins[number].append(index)
    else:
      room, number = length, len(bins)
      bins.append([index])
    if room > size:
      bisect.insort(rooms, (room - size, number))
  for content in sorted((sorted(content) for content in bins), key=lambda content: content[0]):
    yield np.concatenate([pieces[i] for i in content]), [len(pieces[i]) for i in content]
