"""Which row of which source each draw of a run is: weighted mixtures, in closed form.

Draw n belongs to a source by a table of one period of the weights, and is that source's next row in
an order that depends on the seed and the source alone. So a run can start at any draw, and a stage
with other weights goes on with each source where the stage before it stopped.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from grain.experimental import index_shuffle

# Draws after which the table of a mixture repeats, at most. Weights that need a longer one are
# rounded to multiples of one over it.
LONGEST_PERIOD = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One source of a mixture.

  Attributes:
    name: for people.
    key: tells the content: sources with the same key are the same rows, wherever they lie.
    size: rows.
    weight: its share of the draws, relative to the other parts.
    order_seed: decides the order of its rows, below 2**32; see `order_seed`.
  """

  name: str
  key: str
  size: int
  weight: float = 1.0
  order_seed: int = 0

  def row(self, position: int) -> int:
    """Number of the row at a position of the endless order; each epoch is a permutation."""
    epoch, inside = divmod(position, self.size)
    # As in grain's shuffle: a permutation in closed form, of another seed in each epoch.
    seed = (self.order_seed + epoch) % 2**32
    return index_shuffle(inside, max_index=self.size - 1, seed=seed, rounds=4)


def order_seed(seed: int, *words: int) -> int:
  """The seed of an order of rows, from the seed of a run and words that tell sources apart."""
  # Not the seed itself: grain adds the epoch to it, and seed 1 would start with epoch 1 of seed 0.
  return int(np.random.SeedSequence([seed, 0x5F1E, *words]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
  """The rows of a global batch, R of them.

  Attributes:
    number: int64[R], number of the draw in this stage of the run, from 0.
    part: int64[R], index of the source in the mixture.
    position: int64[R], rows of that source drawn before this one, over all stages.
  """

  number: np.ndarray
  part: np.ndarray
  position: np.ndarray

  def __getitem__(self, rows) -> Draws:
    """Some of the rows."""
    return Draws(number=self.number[rows], part=self.part[rows], position=self.position[rows])


class Mixture:
  """Sources drawn by weight.

  After any number n of draws, each source was drawn fewer than one row more or less than its share
  of n. In an epoch of a source every row comes once, in another order than in the epoch before.

  Args:
    parts: the sources.

  Raises:
    ValueError: for a source without rows, a weight that is negative or not finite, weights that
      are all zero, or sources with equal names or content.
  """

  def __init__(self, parts: Sequence[Part]):
    self.parts = tuple(parts)
    _check(self.parts)
    self.period_counts = _integer_shares([part.weight for part in self.parts])
    self.period = int(self.period_counts.sum())
    self._table = schedule(self.period_counts)
    # rank[r]: how often the source of draw r was drawn before, in the same period.
    self._rank = np.empty(self.period, np.int64)
    for index in range(len(self.parts)):
      own = self._table == index
      self._rank[own] = np.arange(np.count_nonzero(own))

  @property
  def shares(self) -> np.ndarray:
    """float64[parts], of the draws, as used: exact, or rounded to 1 / LONGEST_PERIOD."""
    return self.period_counts / self.period

  def draws(self, first: int, count: int, start: dict[str, int] | None = None) -> Draws:
    """Draws `first` to `first + count` of a stage.

    Args:
      start: rows drawn before the stage, by key of the source; missing keys count 0.
    """
    number = first + np.arange(count, dtype=np.int64)
    periods, inside = np.divmod(number, self.period)
    part = self._table[inside].astype(np.int64)
    position = periods * self.period_counts[part] + self._rank[inside]
    return Draws(number=number, part=part, position=position + self._starts(start)[part])

  def counts(self, number: int) -> dict[str, int]:
    """Rows of each source among the first `number` draws, by key."""
    periods, rest = divmod(number, self.period)
    counts = periods * self.period_counts
    counts += np.bincount(self._table[:rest], minlength=len(self.parts))
    return {part.key: int(count) for part, count in zip(self.parts, counts, strict=True)}

  def rows(self, draws: Draws) -> np.ndarray:
    """int64[R], the number of each drawn row within its source."""
    pairs = zip(draws.part, draws.position, strict=True)
    return np.array([self.parts[part].row(int(position)) for part, position in pairs], np.int64)

  def _starts(self, start: dict[str, int] | None) -> np.ndarray:
    return np.array([(start or {}).get(part.key, 0) for part in self.parts], np.int64)


def _check(parts: tuple[Part, ...]):
  if not parts:
    raise ValueError("a mixture has at least one source, got none")
  for part in parts:
    if not (math.isfinite(part.weight) and part.weight >= 0):
      raise ValueError(f"source {part.name!r}: a weight is at least 0, got {part.weight}")
    if not 0 < part.size < 2**32:
      reason = "there is no text to train on" if part.size == 0 else "split it into several"
      raise ValueError(f"source {part.name!r} has {part.size} rows: {reason}")
  if not any(part.weight for part in parts):
    raise ValueError(f"the weights of all {len(parts)} sources are 0; give one a weight above it")
  for what in ("name", "key"):
    values = [getattr(part, what) for part in parts]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
      names = [part.name for part in parts if getattr(part, what) == twice]
      problem = "name; give one another" if what == "name" else "content; give it once"
      raise ValueError(f"sources {', '.join(map(repr, names))} have the same {problem}")


def _integer_shares(weights: Sequence[float]) -> np.ndarray:
  """Draws of each source in a period: exact for the decimal numbers that the weights print as."""
  fractions = [Fraction(repr(float(weight))) for weight in weights]
  common = math.lcm(*(fraction.denominator for fraction in fractions))
  counts = [int(fraction * common) for fraction in fractions]
  divisor = math.gcd(*counts)
  counts = [count // divisor for count in counts]
  total = sum(counts)
  if total > LONGEST_PERIOD:
    # Largest remainders; no source with a weight is left out.
    exact = [Fraction(count * LONGEST_PERIOD, total) for count in counts]
    rounded = [max(1, int(share)) if share else 0 for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (rounded[i] - exact[i], i))
    for i in order[: max(0, LONGEST_PERIOD - sum(rounded))]:
      rounded[i] += 1
    counts = rounded
  return np.array(counts, np.int64)


def schedule(counts: np.ndarray) -> np.ndarray:
  """int32[period]: which source each draw of a period is of, as evenly as whole draws can be.

  Draw j (from 1) of a source with share w may come at times floor((j - 1) / w) + 1 to ceil(j / w)
  only, which is what a deviation below one row means; the earliest deadline first meets all of
  them (Tijdeman, The chairman assignment problem, 1980; Baruah et al., Proportionate progress,
  1996).
  """
  period = int(counts.sum())
  table = np.empty(period, np.int32)
  release = [[] for _ in range(period + 1)]
  for index, count in enumerate(counts):
    if count:
      release[0].append((-(-period // int(count)), index, 1))
  ready = []
  for time in range(period):
    for job in release[time]:
      heapq.heappush(ready, job)
    release[time] = []
    _, index, number = heapq.heappop(ready)
    table[time] = index
    count = int(counts[index])
    if number < count:
      following = (-(-(number + 1) * period // count), index, number + 1)
      earliest = number * period // count
      if earliest <= time + 1:
        release[time + 1].append(following)
      else:
        release[earliest].append(following)
  return table
