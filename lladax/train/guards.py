"""Guards that set a run back: a loss that jumps, or is no number, undoes the steps behind it.

What happens then, whoever runs it: the newest checkpoint before the bad step is restored, and the
data goes on after the batches that were seen since (`plan_rollback`). The noise of a step stays
that of its number. All of it is a function of what was seen, so that a run that is killed in the
middle ends the same, in this order: checkpoints after the restored one are set aside; the record is
written (`add_rollback`); training goes on. Killed before the record, the run comes to the same
alarm again. Killed after it, a restart that finds the restored checkpoint the newest puts the data
where the last record says; later checkpoints have the place of the data in them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections import deque
from collections.abc import Collection, Sequence

from etils import epath

from lladax.types import Sums

RECORDS = "rollbacks.jsonl"
# The median absolute deviation of a normal distribution, times this, is its standard deviation.
NORMAL_MAD = 1.4826
# Losses that differ by less than this part of themselves are the same to a guard.
LEAST_DEVIATION = 1e-3


class StepBack(Exception):
  """What a guard saw.

  Attributes:
    first: the first bad step, counted from 1.
    seen: the step at which it was noticed.
  """

  def __init__(self, message: str, *, first: int, seen: int):
    super().__init__(message)
    self.first, self.seen = first, seen

  @property
  def good(self) -> int:
    """The last step before the bad ones; 0 if there is none."""
    return self.first - 1


class Spike(StepBack):
  """The loss jumped."""


class GuardError(RuntimeError):
  """A run cannot be set back, or not again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
  """When a run is set back by itself, and how far. Without one, it never is.

  Attributes:
    spike: a step is bad when its `metric` lies this many standard deviations (1.4826 median
      absolute deviations) above the median of the window; None: it is not looked at.
    metric: of the step. `masked_nll` is the plain mean over masked tokens. In 1500 steps of a small
      LLaDA-MoE with weights 1 / t (16 rows of 128 bytes) neither it nor `loss` stood 6 deviations
      above the median of 200; `grad_norm` did 8 times.
    window: good steps that the median is taken of. Nothing is bad until there are so many.
    patience: bad steps in a row that make a spike.
    nonfinite: steps back when `Experiment.max_nonfinite` is reached, too, instead of ending.
    back: steps before the first bad one that are undone at least.
    skip: batches that are left out after those seen.
    max_rollbacks: how often; the next alarm ends the run.

  Raises:
    ValueError: for numbers out of range.
  """

  spike: float | None = 10.0
  metric: str = "masked_nll"
  window: int = 200
  patience: int = 1
  nonfinite: bool = True
  back: int = 0
  skip: int = 0
  max_rollbacks: int = 3

  def __post_init__(self):
    if self.spike is not None and not 0 < self.spike < float("inf"):
      raise ValueError(f"spike is a positive number of deviations, or None; got {self.spike}")
    for name, least in (("window", 3), ("patience", 1), ("back", 0), ("skip", 0),
                        ("max_rollbacks", 1)):  # fmt: skip
      if getattr(self, name) < least:
        raise ValueError(f"{name} is at least {least}; got {getattr(self, name)}")


class SpikeGuard:
  """A reader for `lladax.train.fit` that raises `Spike`; its state is saved with a checkpoint.

  Bad steps do not enter the window. Steps that were skipped have no value and are passed over.
  """

  def __init__(self, config: GuardConfig):
    self._config = config
    self._values: deque[float] = deque(maxlen=config.window)
    self._bad: list[int] = []  # the latest steps in a row

  def __call__(self, step: int, metrics: Sums, seconds: float | None):
    """Takes in one step.

    Raises:
      Spike: if it makes one.
      KeyError: if the step has no such metric; the message lists those it has.
    """
    del seconds
    name = self._config.metric
    if self._config.spike is None:
      return
    if name not in metrics.sums:
      raise KeyError(f"guard.metric {name!r} is none of {', '.join(sorted(metrics.sums))}")
    if not metrics.counts[name] > 0:
      return
    value = float(metrics.sums[name]) / float(metrics.counts[name])
    bound = self.bound()
    if bound is None or value <= bound:
      self._values.append(value)
      self._bad = []
      return
    self._bad.append(step)
    if len(self._bad) >= self._config.patience:
      raise Spike(
        f"step {step}: {name} {value:.4g} is above {bound:.4g}, {self._config.spike:g} deviations "
        f"over the median {statistics.median(self._values):.4g} of {self._config.window} steps",
        first=self._bad[0],
        seen=step,
      )

  def bound(self) -> float | None:
    """The largest value that is not bad now; None before the window is full."""
    if len(self._values) < self._config.window:
      return None
    median = statistics.median(self._values)
    deviation = NORMAL_MAD * statistics.median(abs(value - median) for value in self._values)
    return median + self._config.spike * max(deviation, LEAST_DEVIATION * abs(median))

  def get_state(self) -> dict:
    return {"values": list(self._values), "bad": list(self._bad)}

  def set_state(self, state: dict):
    self._values = deque(state["values"], maxlen=self._config.window)
    self._bad = list(state["bad"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
  """One step back, as it is recorded.

  Attributes:
    first: the first bad step.
    seen: the step at which it was noticed.
    to: the step of the checkpoint that is restored.
    next_batch: the number of the batch that step `to + 1` takes, counted from 0. Without rollbacks
      step n takes batch n - 1.
    reason: one line.
  """

  first: int
  seen: int
  to: int
  next_batch: int
  reason: str


def plan_rollback(
  config: GuardConfig, alarm: StepBack, saved: Collection[int], past: Sequence[Rollback] = ()
) -> Rollback:
  """Where a run goes on after an alarm.

  Args:
    config: how far back, how much is skipped, how often.
    alarm: what was seen.
    saved: steps of the whole checkpoints.
    past: the rollbacks before, in order.

  Raises:
    GuardError: if there were as many as allowed, or no checkpoint is from before the alarm.
  """
  if len(past) >= config.max_rollbacks:
    raise GuardError(
      f"{alarm}; the run was set back {len(past)} times already (guard.max_rollbacks)"
    )
  before = [step for step in saved if step <= alarm.good - config.back]
  if not before:
    raise GuardError(
      f"{alarm}; no checkpoint is from step {alarm.good - config.back} or before (there are "
      f"{sorted(saved) or 'none'}): lower save_every, raise keep, or lower guard.back"
    )
  shift = past[-1].next_batch - past[-1].to if past else 0
  return Rollback(
    first=alarm.first,
    seen=alarm.seen,
    to=max(before),
    next_batch=alarm.seen + shift + config.skip,
    reason=" ".join(str(alarm).split()),
  )


def add_rollback(workdir: os.PathLike, rollback: Rollback):
  """Adds a record to `rollbacks.jsonl`, in one move. On one process."""
  records = [*read_rollbacks(workdir), rollback]
  path = epath.Path(workdir) / RECORDS
  new = path.with_suffix(".new")
  new.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))
  new.replace(path)


def read_rollbacks(workdir: os.PathLike) -> list[Rollback]:
  """The rollbacks of a run, in order."""
  path = epath.Path(workdir) / RECORDS
  lines = path.read_text().splitlines() if path.exists() else []
  return [Rollback(**json.loads(line)) for line in lines]
