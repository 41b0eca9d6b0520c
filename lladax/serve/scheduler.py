"""Who is decoded when: a bounded queue, an engine per sampler, one thread that runs them.

Requests of one sampler share an engine, a lane, and come and go at its block boundaries. Lanes
take turns, a block each. JAX is only ever called from the one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from absl import logging

from lladax.infer import SamplerConfig
from lladax.infer.engine import Engine, Request, Update
from lladax.serve.metrics import Metrics

# What a job hears of: its next block, or why there is none.
Listen = Callable[[Update | Exception], None]


class QueueFull(Exception):
  """There are as many requests waiting as there may be."""


class Stopping(Exception):
  """The server takes no more requests."""


class Refused(Exception):
  """What the engine says of a request, or of a sampler, that it does not take."""


@dataclasses.dataclass(eq=False)
class Job:
  """One row on its way.

  Attributes:
    config: how it is decoded.
    request: what is to be written.
    listen: called from the engine's thread with every block, the last one `done`, or with the
      exception that ended it; never after either, nor much after `Scheduler.cancel`.
  """

  config: SamplerConfig
  request: Request
  listen: Listen
  cancelled: bool = False
  submitted: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass
class _Lane:
  engine: Engine
  jobs: dict[int, Job] = dataclasses.field(default_factory=dict)  # by ticket
  used: float = 0.0


class Scheduler:
  """Runs jobs. `start` it, or use it as a context manager.

  Within a lane jobs begin in the order in which they came. A job whose sampler has no lane waits
  until one is idle, and those behind it wait, too, so that it is not overtaken for ever.

  Args:
    open_engine: an engine for a sampler.
    max_queue: jobs that may wait.
    max_lanes: engines at a time; the one idle longest makes room for another.
    context: entered in the thread: the mesh.
    metrics: counts what happens.
  """

  def __init__(
    self,
    open_engine: Callable[[SamplerConfig], Engine],
    *,
    max_queue: int = 64,
    max_lanes: int = 4,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    metrics: Metrics | None = None,
  ):
    for name, value in (("max_queue", max_queue), ("max_lanes", max_lanes)):
      if value < 1:
        raise ValueError(f"{name} is at least 1; got {value}")
    self._open_engine, self._context = open_engine, context
    self._max_queue, self._max_lanes = max_queue, max_lanes
    self._waiting: deque[Job] = deque()
    self._lanes: dict[SamplerConfig, _Lane] = {}
    self._changed = threading.Condition()
    self._stopping = self._aborting = False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._metrics = metrics or Metrics()
    self._metrics.watch(
      waiting=lambda: self.waiting, active=lambda: self.active, lanes=lambda: len(self._lanes)
    )

  def __enter__(self) -> Scheduler:
    self.start()
    return self

  def __exit__(self, *_):
    self.stop(drain=False)

  def start(self):
    self._thread.start()

  @property
  def alive(self) -> bool:
    """Whether requests are taken and the thread runs."""
    return self._thread.is_alive() and not self._stopping

  @property
  def waiting(self) -> int:
    return len(self._waiting)

  @property
  def active(self) -> int:
    return sum(len(lane.jobs) for lane in list(self._lanes.values()))

  def submit(self, jobs: Sequence[Job]):
    """Puts jobs into the queue, all or none.

    Raises:
      QueueFull: without room for all of them.
      Stopping: after `stop`, or if the thread has died.
    """
    with self._changed:
      if not self.alive:
        raise Stopping("the server is shutting down")
      if len(self._waiting) + len(jobs) > self._max_queue:
        raise QueueFull(
          f"{len(self._waiting)} answers are waiting and {len(jobs)} more were asked for; "
          f"{self._max_queue} may wait: try again later"
        )
      self._waiting.extend(jobs)
      self._changed.notify()

  def cancel(self, jobs: Sequence[Job]):
    """Forgets jobs. Those that wait make room at once, those that are decoded after their block.

    Nothing happens to those that are done.
    """
    with self._changed:
      gone = [job for job in jobs if job in self._waiting]
      for job in gone:
        self._waiting.remove(job)
      for job in jobs:
        job.cancelled = True
      self._changed.notify()
    self._metrics.cancelled(len(gone))

  def stop(self, *, drain: bool = True, timeout: float | None = None):
    """Takes no more jobs and waits for the thread.

    Args:
      drain: whether jobs are still decoded; else, and after `timeout` seconds, they end with
        `Stopping` after the block that is being decoded.
    """
    with self._changed:
      self._stopping, self._aborting = True, self._aborting or not drain
      self._changed.notify()
    if not self._thread.is_alive():
      return
    self._thread.join(timeout)
    if self._thread.is_alive():
      with self._changed:
        self._aborting = True
        self._changed.notify()
      self._thread.join()

  # --- In the engine's thread ---

  def _run(self):
    try:
      with self._context():
        while self._next():
          self._drop_cancelled()
          self._admit()
          for config, lane in list(self._lanes.items()):
            if lane.jobs:
              self._step(config, lane)
    except Exception:
      logging.exception("the engine's thread ended")
    finally:
      self._stopping = True
      for job in self._everybody():
        job.listen(Stopping("the server is shutting down"))

  def _next(self) -> bool:
    """Waits for something to do; False when that was all."""
    with self._changed:
      while not (self._stopping or self._waiting or self.active):
        self._changed.wait()
      return not self._aborting and bool(self._waiting or self.active or not self._stopping)

  def _everybody(self) -> list[Job]:
    with self._changed:
      jobs = [job for lane in self._lanes.values() for job in lane.jobs.values()]
      jobs += self._waiting
      self._waiting.clear()
      self._lanes.clear()
    return [job for job in jobs if not job.cancelled]

  def _drop_cancelled(self):
    for lane in self._lanes.values():
      gone = [ticket for ticket, job in lane.jobs.items() if job.cancelled]
      for ticket in gone:
        lane.engine.cancel(ticket)
        del lane.jobs[ticket]
      self._metrics.cancelled(len(gone))

  def _admit(self):
    """Moves waiting jobs into free slots."""
    with self._changed:
      waiting = list(self._waiting)
    full: set[SamplerConfig] = set()
    for job in waiting:
      if job.config in full or job.cancelled:
        continue
      try:
        lane = self._lane(job.config)
        if lane is None:
          break
        if not lane.engine.free:
          full.add(job.config)
          continue
        ticket = lane.engine.add(job.request)
      except ValueError as error:
        self._refuse(job, Refused(str(error)))
      except Exception as error:  # out of memory
        logging.exception("an engine could not take a request")
        self._refuse(job, error)
      else:
        with self._changed:
          if job.cancelled:  # it left meanwhile
            lane.engine.cancel(ticket)
            continue
          self._waiting.remove(job)
          lane.jobs[ticket] = job
        self._metrics.started(time.monotonic() - job.submitted)

  def _refuse(self, job: Job, error: Exception):
    with self._changed:
      if job.cancelled:
        return
      self._waiting.remove(job)
    job.listen(error)

  def _lane(self, config: SamplerConfig) -> _Lane | None:
    """The lane of a sampler, opened if need be; None if that has to wait."""
    lane = self._lanes.get(config)
    if lane is None:
      if len(self._lanes) >= self._max_lanes:
        idle = [known for known, lane in self._lanes.items() if not lane.jobs]
        if not idle:
          return None
        del self._lanes[min(idle, key=lambda known: self._lanes[known].used)]
      lane = self._lanes[config] = _Lane(self._open_engine(config))
    lane.used = time.monotonic()
    return lane

  def _step(self, config: SamplerConfig, lane: _Lane):
    begin = time.monotonic()
    try:
      updates = lane.engine.step()
    except Exception as error:
      # What state the engine is in, nobody knows: its jobs fail, the next ones get a fresh one.
      logging.exception("decoding failed")
      del self._lanes[config]
      for job in lane.jobs.values():
        if not job.cancelled:
          job.listen(error)
      return
    self._metrics.stepped(time.monotonic() - begin, rows=len(lane.jobs), updates=updates)
    for update in updates:
      job = lane.jobs[update.ticket]
      if update.done:
        del lane.jobs[update.ticket]
      if not job.cancelled:
        job.listen(update)
