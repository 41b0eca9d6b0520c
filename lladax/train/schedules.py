"""Learning-rate schedules: a warm-up, then constant, cosine, WSD or any number of plateaus."""

from __future__ import annotations

import abc
import dataclasses
import itertools

import optax


class LearningRate(abc.ABC):
  """The learning rate as a multiple of its peak, over the updates of a run."""

  @abc.abstractmethod
  def factor(self, steps: int) -> optax.Schedule:
    """Update count -> factor in [0, 1], for a run of `steps` updates.

    Raises:
      ValueError: if the phases do not fit into `steps`.
    """


def _one(count):
  del count
  return 1.0


def _after_warmup(warmup: int, schedule: optax.Schedule) -> optax.Schedule:
  if not warmup:
    return schedule
  # The first update has a factor of 1 / warmup: one with 0 would be lost.
  rising = optax.linear_schedule(1.0 / warmup, 1.0, max(warmup - 1, 1))
  return optax.join_schedules([rising, schedule], [warmup])


def _check(schedule):
  if schedule.warmup < 0:
    raise ValueError(f"warmup is a number of updates, at least 0; got {schedule.warmup}")
  if not 0 <= getattr(schedule, "final", 0.0) <= 1:
    raise ValueError(f"final is a fraction of the peak in [0, 1]; got {schedule.final}")


def _check_warmup(schedule, steps: int):
  if schedule.warmup >= steps:
    raise ValueError(
      f"a run of {steps} updates ends within the warm-up of {schedule.warmup}; lower "
      f"warmup or raise steps"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(LearningRate):
  """Linear warm-up from 0 over `warmup` updates, then 1."""

  warmup: int = 0

  def __post_init__(self):
    _check(self)

  def factor(self, steps: int) -> optax.Schedule:
    _check_warmup(self, steps)
    return _after_warmup(self.warmup, optax.constant_schedule(1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineDecay(LearningRate):
  """Linear warm-up from 0, then half a cosine from 1 to `final` as the run ends."""

  warmup: int = 0
  final: float = 0.1  # as a fraction of the peak

  def __post_init__(self):
    _check(self)

  def factor(self, steps: int) -> optax.Schedule:
    _check_warmup(self, steps)
    return _after_warmup(
      self.warmup, optax.cosine_decay_schedule(1.0, steps - self.warmup, alpha=self.final)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wsd(LearningRate):
  """Warm-up, stable, decay: linear to 1, constant, then linear to `final` as the run ends.

  Attributes:
    warmup: updates of the linear warm-up.
    decay_fraction: share of all updates that decay; used when `decay` is None.
    decay: updates that decay.
    final: last factor, as a fraction of the peak.
  """

  warmup: int = 0
  decay_fraction: float = 0.2
  decay: int | None = None
  final: float = 0.0

  def __post_init__(self):
    _check(self)
    if not 0 <= self.decay_fraction <= 1:
      raise ValueError(f"decay_fraction lies in [0, 1]; got {self.decay_fraction}")
    if self.decay is not None and self.decay < 0:
      raise ValueError(f"decay is a number of updates, at least 0; got {self.decay}")

  def factor(self, steps: int) -> optax.Schedule:
    decay = round(steps * self.decay_fraction) if self.decay is None else self.decay
    stable = steps - self.warmup - decay
    if stable < 0:
      raise ValueError(
        f"a run of {steps} updates is shorter than the warm-up of {self.warmup} and the decay of "
        f"{decay} of {self}; lower them or raise steps"
      )
    falling = optax.linear_schedule(1.0, self.final, decay) if decay else _one
    return _after_warmup(self.warmup, optax.join_schedules([_one, falling], [stable]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateaus(LearningRate):
  """Warm-up, then plateaus one after the other, then a linear decay as the run ends.

  LLaDA-8B (arXiv 2502.09992, section 2.2) took 2.3T tokens: 4e-4 up to 1.2T, 1e-4 up to 2.0T, then
  linearly to 1e-5. With a peak of 4e-4 that is
  `Plateaus(warmup=2000, levels=(1.0, 0.25), ends=(1.2 / 2.3, 2.0 / 2.3), final=0.025)`.

  Attributes:
    warmup: updates of the linear warm-up, to the first level.
    levels: of the plateaus, as fractions of the peak.
    ends: where each plateau ends, as fractions of the run's updates, rising. After the last one the
      factor falls linearly to `final`.
    final: last factor, as a fraction of the peak.

  Raises:
    ValueError: for levels or ends out of range, or not one end for each level.
  """

  warmup: int = 0
  levels: tuple[float, ...] = (1.0,)
  ends: tuple[float, ...] = (1.0,)
  final: float = 0.0

  def __post_init__(self):
    _check(self)
    if not self.levels or len(self.levels) != len(self.ends):
      raise ValueError(
        f"every plateau has a level and an end; got levels={self.levels}, ends={self.ends}"
      )
    if not all(0 < level <= 1 for level in self.levels):
      raise ValueError(f"levels are fractions of the peak in (0, 1]; got {self.levels}")
    rising = all(a < b for a, b in itertools.pairwise((0.0, *self.ends)))
    if not rising or self.ends[-1] > 1:
      raise ValueError(f"ends rise within (0, 1], as fractions of the run; got {self.ends}")

  def factor(self, steps: int) -> optax.Schedule:
    ends = [round(end * steps) for end in self.ends]
    if any(a >= b for a, b in itertools.pairwise((self.warmup, *ends))):
      raise ValueError(
        f"in a run of {steps} updates the plateaus end after {ends} of them: one is empty, or lies "
        f"within the warm-up of {self.warmup}; raise steps, or move warmup or ends"
      )
    flat = [optax.constant_schedule(level) for level in self.levels]
    falling = max(steps - ends[-1], 1)
    flat.append(optax.linear_schedule(self.levels[-1], self.final, falling))
    first = self.levels[0]
    rising = optax.linear_schedule(first / max(self.warmup, 1), first, max(self.warmup - 1, 1))
    return optax.join_schedules([rising, *flat], [self.warmup, *ends])
