"""The loop: a step, what reads its metrics, and what happens every so many steps."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from lladax.sharding import batch_sharding
from lladax.train.checkpoint import Checkpoints
from lladax.train.guards import StepBack
from lladax.train.state import TrainState
from lladax.types import Batch, Sums

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Sums]]
# (step, metrics on the host, seconds the step took or None)
Reader = Callable[[int, Sums, float | None], object]


class NonFiniteError(StepBack, FloatingPointError):
  """Too many steps in a row had a loss or a gradient that is not finite."""


class Stopped(SystemExit):
  """Asked to stop by SIGTERM, the run has ended in order; uncaught, the exit status is 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook:
  """`call(step, state)` after every `every`-th step.

  Attributes:
    at_end: after the last step of the run too.
    on_stop: when the run is asked to stop too.
  """

  call: Callable[[int, TrainState], object]
  every: int
  at_end: bool = False
  on_stop: bool = False

  def is_due(self, step: int, *, last: bool, stopping: bool) -> bool:
    return step % self.every == 0 or (last and self.at_end) or (stopping and self.on_stop)


def every(
  n: int,
  call: Callable[[int, TrainState], object],
  *,
  at_end: bool = False,
  on_stop: bool = False,
) -> Hook:
  """A hook for `fit`.

  Raises:
    ValueError: if n is below 1.
  """
  if n < 1:
    raise ValueError(f"a hook runs every n steps, n at least 1; got {n}")
  return Hook(call=call, every=n, at_end=at_end, on_stop=on_stop)


def fit(
  state: TrainState,
  batches: Iterator[Any],
  train_step: TrainStep,
  *,
  steps: int,
  readers: Sequence[Reader] = (),
  hooks: Sequence[Hook] = (),
) -> TrainState:
  """Trains up to step `steps`, counted from the beginning of the run.

  Step n + 1 is dispatched before the metrics of step n are read, so the device does not wait for
  the host. Hooks run in their order after the metrics of their step were read; one that saves
  comes last, so that a restart repeats what had not happened when it was killed.

  SIGTERM and SIGINT end the run after the step that is under way and after the hooks that are due
  then; a second signal has its usual effect.

  Raises:
    Stopped: after SIGTERM. KeyboardInterrupt: after SIGINT.
    ValueError: if the batches end before the run.
  """
  metrics = _Lag(readers)
  with _StopSignals() as signals:
    for step in range(int(state.step) + 1, steps + 1):
      batch = next(batches, None)
      if batch is None:
        raise ValueError(f"the data ended at step {step} of {steps}")
      state, step_metrics = train_step(state, batch)
      metrics.push(step, step_metrics)
      stopping = signals.stop_after(step)
      due = [hook for hook in hooks if hook.is_due(step, last=step == steps, stopping=stopping)]
      if due or stopping:
        metrics.flush()
      for hook in due:
        hook.call(step, state)
      if stopping:
        signals.leave(step)
    metrics.flush()
  return state


def place(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
  """This process's rows as its part of the global batch on the mesh."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
  )


def stop_on_nonfinite(limit: int, checkpoints: Checkpoints | None = None) -> Reader:
  """A reader that warns of each skipped step, and ends the run after `limit` of them in a row."""

  def read(step: int, metrics: Sums, seconds: float | None):
    del seconds
    in_a_row = int(metrics.sums["skipped_in_a_row"])
    if not in_a_row:
      return
    logging.warning("step %d: loss or gradient not finite, update skipped", step)
    if in_a_row >= limit:
      finite = step - in_a_row
      saved = [] if checkpoints is None else [s for s in checkpoints.all_steps if s <= finite]
      newest = checkpoints.directory / str(max(saved)) if saved else "none was saved"
      raise NonFiniteError(
        f"loss or gradient not finite in {in_a_row} steps in a row, up to step {step}; last "
        f"checkpoint before: {newest}. A lower learning rate or a longer warm-up may help",
        first=finite + 1,
        seen=step,
      )

  return read


def warn_of_drops(step: int, metrics: Sums, seconds: float | None):
  """A reader that says so when an exchange dropped slots for which its buffers had no room."""
  del seconds
  dropped = float(metrics.sums.get("dropped_slots", 0))
  if dropped:
    logging.warning(
      "step %d: %d slots found no room and were not computed; a larger buffer_factor, or "
      "on_overflow='gather', computes them",
      step,
      dropped,
    )


class _Lag:
  """Holds back the metrics of the latest step until the next one was dispatched."""

  def __init__(self, readers: Sequence[Reader]):
    self._readers = readers
    self._pending: tuple[int, Sums] | None = None
    self._clock: float | None = None

  def push(self, step: int, metrics: Sums):
    self._read()
    self._pending = (step, metrics)

  def flush(self):
    """Reads what is left; the time until the next step is not taken for a step's."""
    self._read()
    self._clock = None

  def _read(self):
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    metrics = jax.device_get(metrics)
    now = time.monotonic()
    seconds = None if self._clock is None else now - self._clock
    self._clock = now
    for reader in self._readers:
      reader(step, metrics, seconds)


class _StopSignals:
  """Within it, the first SIGTERM or SIGINT is a request; it puts back what was before."""

  def __init__(self):
    self._requested: int | None = None
    self._before = {}

  def __enter__(self) -> _StopSignals:
    # Python lets only the main thread handle signals. Between processes JAX agrees on the step.
    if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _request(self, number: int, frame):
    del frame
    self._requested = number
    self.__exit__()

  def stop_after(self, step: int) -> bool:
    """Whether this step is the last one; the same answer on every process."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self._requested = signal.SIGTERM
    return self._requested is not None

  def leave(self, step: int):
    logging.warning("stopped after step %d by %s", step, signal.Signals(self._requested).name)
    if self._requested == signal.SIGINT:
      raise KeyboardInterrupt
    raise Stopped(0)
