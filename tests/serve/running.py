"""A server in a thread, and clients of it."""

import contextlib
import threading
import time

import uvicorn
from stand_in import StandIn

from lladax.serve import Limits, Metrics, Scheduler, Served, make_app

KEY = "a-key"


class Running:
  """A server on a port of its own.

  Attributes:
    url: where it listens. engines: the stand-ins that it opened. scheduler, metrics: its own.
  """

  def __init__(
    self, model, *, open_engine=None, limits=None, api_key=None, open_sampler=False, drain=10.0,
    warm_up=False, engine=None, **options,
  ):  # fmt: skip
    self.engines, self.metrics = [], Metrics()

    def stand_in(config):
      self.engines.append(StandIn(config, **(engine or {})))
      return self.engines[-1]

    self.served = Served(model=model, name="tiny", length=96, open_sampler=open_sampler)
    self.served.check()
    self.scheduler = Scheduler(open_engine or stand_in, metrics=self.metrics, **options)
    app = make_app(
      self.served, self.scheduler, metrics=self.metrics, limits=limits or Limits(max_tokens=64),
      api_key=api_key, drain_seconds=drain, warm_up=warm_up,
    )  # fmt: skip
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=drain)
    self.server = uvicorn.Server(config)
    self._socket = config.bind_socket()
    self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
    self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]})

  def __enter__(self):
    self.thread.start()
    until(lambda: self.server.started or not self.thread.is_alive())
    assert self.server.started
    return self

  def __exit__(self, *_):
    self.stop()
    self.thread.join(30)
    assert not self.thread.is_alive()

  def stop(self):
    self.server.should_exit = True


def until(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it took too long"
    time.sleep(0.005)


@contextlib.contextmanager
def opened_later(gate, seconds=0.0):
  """Opens a gate for good at the end, so that nothing waits for ever if a test fails."""
  try:
    yield gate
  finally:
    gate.release(10_000)
