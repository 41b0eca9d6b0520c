"""A running check that the noise of a run is the noise that its schedule says.

Given the times, every mask is an independent draw, so the masked tokens of a noise level are known
in mean and variance; and the times themselves have a known distribution. Draws in a coarse type, a
wrong schedule, or keys that repeat from step to step, show as a drift of these counts long before
they show in a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from lladax.diffusion import TimeSampler
from lladax.types import Sums

KINDS = ("masks", "times")
SCOPES = ("all", "recent")
# Draws are multiples of 2^-23, and rates are rounded to float32: what a mean can be off by itself.
GRID = 2.0**-22

Write = Callable[[int, dict[str, Any]], object]


class NoiseDrift(RuntimeError):
  """The noise that was drawn is not that of the schedule."""


class NoiseWatch:
  """A reader for `lladax.train.fit`: counts masked tokens and rows by t, and raises an alarm.

  Every `every` steps each count of a bucket of t, of the whole run and of its latest stretch, is
  compared with its mean, and so is that of all buckets. The bound is Bernstein's inequality, which
  holds for any number of draws, with a probability that is shared out over buckets, kinds, stretches
  and looks (look j gets a part 6 / (pi j)^2 of it). A run whose noise is right raises an alarm with a
  probability of at most `false_alarm`, however long it is.

  The state is saved with a checkpoint, so a restart goes on counting.

  Args:
    times: how times are drawn, for their distribution.
    every: steps between looks.
    recent: looks after which the latest stretch begins anew.
    false_alarm: see above.
    on_drift: "warn" logs it at every look, "stop" raises `NoiseDrift`.
    write: (step, values) -> None, such as `Metrics.write`: gets `noise_z_by_t` and
      `times_z_by_t`, deviations of the whole run in standard deviations, and `noise_alarm`, 0 or 1.

  Raises:
    ValueError: for arguments out of range.
  """

  def __init__(
    self,
    times: TimeSampler,
    *,
    every: int = 100,
    recent: int = 20,
    false_alarm: float = 1e-3,
    on_drift: Literal["warn", "stop"] = "warn",
    write: Write | None = None,
  ):
    if every < 1 or recent < 1:
      raise ValueError(f"every and recent are at least 1; got {every} and {recent}")
    if not 0 < false_alarm < 1:
      raise ValueError(f"false_alarm is a probability in (0, 1); got {false_alarm}")
    if on_drift not in ("warn", "stop"):
      raise ValueError(f"on_drift is 'warn' or 'stop'; got {on_drift!r}")
    self._times, self._every, self._recent = times, every, recent
    self._false_alarm, self._on_drift, self._write = false_alarm, on_drift, write
    self._looks = 0
    # (kind, scope) -> [4, T_BUCKETS]: count, its mean, its variance, of how many.
    self._sums: dict[str, np.ndarray] = {}

  def __call__(self, step: int, metrics: Sums, seconds: float | None):
    """Takes in one step.

    Raises:
      NoiseDrift: at a look at which the noise has drifted, if asked for.
    """
    del seconds
    self._add("masks", mask_counts(metrics))
    self._add("times", time_counts(metrics, self._times))
    if step % self._every == 0:
      self._look(step)

  def _add(self, kind: str, counts: np.ndarray):
    for scope in SCOPES:
      key = f"{kind} {scope}"
      self._sums[key] = self._sums.get(key, 0.0) + counts

  def _look(self, step: int):
    self._looks += 1
    findings = self.findings(step)
    if self._write is not None:
      values = {
        "noise_z_by_t": deviations(self._sums["masks all"]),
        "times_z_by_t": deviations(self._sums["times all"]),
        "noise_alarm": int(bool(findings)),
      }
      self._write(step, values)
    if self._looks % self._recent == 0:
      for kind in KINDS:
        self._sums[f"{kind} recent"] = np.zeros_like(self._sums[f"{kind} recent"])
    if not findings:
      return
    message = (
      f"step {step}: the noise is not that of the schedule: {'; '.join(findings)}. What is trained "
      "is another loss than the objective says; look for draws or times in bfloat16, keys that "
      "repeat, or another schedule"
    )
    if self._on_drift == "stop":
      raise NoiseDrift(message)
    logging.error("%s", message)

  def findings(self, step: int) -> list[str]:
    """What is beyond its bound now, one line each."""
    found = []
    for key, sums in self._sums.items():
      buckets = sums.shape[1]
      # What is wrong at every t shows soonest in all together, the last column.
      sums = np.concatenate([sums, sums.sum(1, keepdims=True)], axis=1)
      probability = self._false_alarm * 6 / (math.pi * max(self._looks, 1)) ** 2
      beyond = excess(sums, probability / (len(self._sums) * sums.shape[1])) > 0
      for cell in np.flatnonzero(beyond):
        count, mean, _, of = sums[:, cell]
        low, high = (cell / buckets, (cell + 1) / buckets) if cell < buckets else (0, 1)
        what = "tokens masked" if key.startswith("masks") else "rows drawn"
        found.append(
          f"at t in [{low:g}, {high:g}) {count / of:.6f} of {what}, {mean / of:.6f} expected, "
          f"{deviations(sums)[cell]:+.1f} standard deviations ({key.split()[1]} steps up to {step})"
        )
    return found

  def get_state(self) -> dict[str, Any]:
    sums = {key: value.tolist() for key, value in self._sums.items()}
    return {"looks": self._looks, "sums": sums}

  def set_state(self, state: dict[str, Any]):
    self._looks = state["looks"]
    self._sums = {key: np.array(value, np.float64) for key, value in state["sums"].items()}


def mask_counts(metrics: Sums) -> np.ndarray:
  """[4, T_BUCKETS] of a step: masked tokens, their mean and variance, maskable tokens."""
  names = ("mask_rate_by_t", "mask_rate_expected_by_t", "mask_variance_by_t")
  rows = [metrics.sums[name] for name in names]
  return np.array([*rows, metrics.counts[names[0]]], np.float64)


def time_counts(metrics: Sums, times: TimeSampler) -> np.ndarray:
  """[4, T_BUCKETS] of a step: rows, their mean, a bound of their variance, all rows.

  The variance is that of independent times; spread ones (stratified, antithetic) have less.
  """
  rows = np.array(metrics.sums["rows_by_t"], np.float64)
  total = np.broadcast_to(np.float64(metrics.counts["rows_by_t"]), rows.shape)
  edges = np.arange(rows.size + 1) / rows.size
  share = np.diff([times.cdf(edge) for edge in edges])
  return np.array([rows, total * share, total * share * (1 - share), total])


def excess(sums: np.ndarray, probability: float) -> np.ndarray:
  """How far each count is beyond where it is but with this probability; negative within.

  Bernstein: a sum of independent terms within 1 of their means, of variance V in all, is off by
  s = c / 3 + sqrt(c^2 / 9 + 2 V c) or more with a probability of at most 2 exp(-c).
  """
  count, mean, variance, of = sums
  c = math.log(2 / probability)
  return np.abs(count - mean) - (c / 3 + np.sqrt(c**2 / 9 + 2 * variance * c)) - GRID * of


def deviations(sums: np.ndarray | Sequence) -> np.ndarray:
  """(count - mean) / standard deviation; NaN where nothing was counted."""
  count, mean, variance, _ = np.asarray(sums)
  root = np.sqrt(np.where(variance > 0, variance, np.nan))
  return (count - mean) / root
