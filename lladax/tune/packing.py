"""Several answers in a row: best fit, anew in every epoch, as a function of the seed alone."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence

import numpy as np

from lladax.tune.turns import Turns


def best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
  """Items into as few rows as best fit decreasing makes of them.

  The longest item first, each into the fullest row that has room for it; of items with equal
  lengths the first comes first.

  Args:
    lengths: int[items], none above `room`.
    room: of a row.

  Returns:
    The items of each row; every item once.
  """
  rows: list[list[int]] = []
  # Rows by the room that is left, and which rooms there are as the bits of one integer: the lowest
  # bit from `length` on is the fullest row that fits.
  by_room: list[list[int]] = [[] for _ in range(room + 1)]
  rooms = 0
  for item in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[item])
    fitting = rooms >> length
    if fitting:
      left = length + (fitting & -fitting).bit_length() - 1
      row = by_room[left].pop()
      if not by_room[left]:
        rooms ^= 1 << left
      rows[row].append(item)
    else:
      left, row = room, len(rows)
      rows.append([item])
    by_room[left - length].append(row)
    rooms |= 1 << (left - length)
  return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Epoch:
  """The rows of one epoch: every conversation once, by one of its turns.

  Attributes:
    rows: the conversations of each row.
    turn: int64[C], the turn of each conversation.
    tail: int64[C], the end-of-text tokens after its answer.
  """

  rows: Sequence[Sequence[int]]
  turn: np.ndarray
  tail: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)


class Packing:
  """Endless rows of packed turns, by position; each epoch has its own turns, rows and order.

  Args:
    turns: what is packed.
    length: L, of a row.
    seed: decides everything that is drawn.
    tail: the most end-of-text tokens after an answer; see `ConversationConfig.eos_tail`.
  """

  def __init__(self, turns: Turns, *, length: int, seed: int, tail: int):
    self._turns, self._length, self._seed, self._tail = turns, length, seed, tail
    self._ends: list[int] = []  # rows up to the end of each epoch
    self._lock = threading.RLock()  # batches are prepared in threads
    self._epoch = functools.lru_cache(maxsize=3)(self._pack)

  def locate(self, position: int) -> tuple[int, int]:
    """(epoch, row in it) of a position in the endless order."""
    epoch = 0
    while position >= self.end(epoch):
      epoch += 1
    return epoch, position - (self.end(epoch - 1) if epoch else 0)

  def end(self, epoch: int) -> int:
    """Rows up to the end of an epoch, earlier ones included."""
    with self._lock:
      while len(self._ends) <= epoch:
        before = self._ends[-1] if self._ends else 0
        self._ends.append(before + len(self._epoch(len(self._ends))))
      return self._ends[epoch]

  def epoch(self, epoch: int) -> Epoch:
    """The rows of an epoch, in their order."""
    with self._lock:
      return self._epoch(epoch)

  def _pack(self, epoch: int) -> Epoch:
    turns, count = self._turns, self._turns.num_conversations
    random = np.random.Generator(
      np.random.Philox(np.random.SeedSequence([self._seed, epoch, 0xBE57]))
    )
    turn = turns.choose(np.arange(count), random.random(count))
    tail = random.integers(0, self._tail, size=count, endpoint=True)
    # Which of equal lengths come together, and in what order the rows come, is drawn.
    shuffled = random.permutation(count)
    rows = best_fit((turns.lengths[turn] + tail)[shuffled], self._length)
    order = random.permutation(len(rows))
    return Epoch([shuffled[rows[index]].tolist() for index in order], turn, tail)
