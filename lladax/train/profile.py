"""A trace of some steps: what the devices did when, to be looked at in XProf or Perfetto."""

from __future__ import annotations

import os

import jax
from absl import logging

from lladax.train.state import TrainState


class Trace:
  """A hook for `lladax.train.fit` that traces the steps first to last, and a context around it.

  Entered, it begins at once if the run is there already; left, it ends a trace that is under way.

  Args:
    first: counted from 1.
    last: the last step in the trace. Steps before the run's own first are left out.
    step: taken so far.
    directory: gets `plugins/profile/...`: `xprof --logdir=<directory>` shows it.
  """

  def __init__(self, first: int, last: int, *, step: int, directory: str | os.PathLike):
    self._first, self._last, self._directory = max(first, step + 1), last, os.fspath(directory)
    self._step, self._running = step, False

  def __enter__(self) -> Trace:
    if self._step >= self._last:
      logging.warning("nothing to trace: step %d was taken before", self._last)
    elif self._first == self._step + 1:
      self._start()
    return self

  def __exit__(self, *exception):
    if self._running:
      self._stop()

  def is_due(self, step: int, *, last: bool, stopping: bool) -> bool:
    del last, stopping
    return step in (self._first - 1, self._last) and step > self._step

  def call(self, step: int, state: TrainState):
    if step == self._last:
      jax.block_until_ready(state)
      self._stop()
    else:
      jax.block_until_ready(state)  # what came before is not in the trace
      self._start()

  def _start(self):
    jax.profiler.start_trace(self._directory)
    self._running = True

  def _stop(self):
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      logging.warning("wrote the trace of steps %d to %d: %s", self._first, self._last,
                      self._directory)  # fmt: skip
