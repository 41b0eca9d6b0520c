"""The scheduler: who waits, who shares an engine, who is told what, and that nobody is forgotten."""

import threading
import time

import pytest
from stand_in import StandIn, written

from lladax.infer import SamplerConfig
from lladax.infer.engine import Request, Update
from lladax.serve import Job, Metrics, QueueFull, Refused, Scheduler, Stopping

CONFIG = SamplerConfig(gen_length=8, steps=8, block_length=4)


class Listener:
  """Collects what a job hears."""

  def __init__(self):
    self.events, self.over = [], threading.Event()

  def __call__(self, event):
    assert not self.over.is_set(), "a job hears nothing after its end"
    self.events.append(event)
    if isinstance(event, Exception) or event.done:
      self.over.set()

  def tokens(self):
    assert self.over.wait(20)
    assert all(isinstance(event, Update) for event in self.events), self.events
    return [token for event in self.events for token in event.tokens]

  def error(self):
    assert self.over.wait(20)
    return self.events[-1]


class Bench:
  """A scheduler over stand-ins, with a gate that lets one step through at a time."""

  def __init__(self, *, gated=False, slots=2, engine=None, **options):
    self.gate = threading.Semaphore(0) if gated else None
    self.engines, self.metrics = [], Metrics()
    self.engine = {"slots": slots, **(engine or {})}
    self.scheduler = Scheduler(self._open, metrics=self.metrics, **options)

  def _open(self, config):
    self.engines.append(StandIn(config, gate=self.gate, **self.engine))
    return self.engines[-1]

  def __enter__(self):
    self.scheduler.start()
    return self

  def __exit__(self, *_):
    self.open_gate()
    self.scheduler.stop(drain=False)

  def open_gate(self, steps=1000):
    if self.gate is not None:
      self.gate.release(steps)

  def submit(self, *prompts, config=CONFIG, **request):
    listeners = [Listener() for _ in prompts]
    jobs = [
      Job(config=config, request=Request(ids=list(prompt), **request), listen=listener)
      for prompt, listener in zip(prompts, listeners, strict=True)
    ]
    self.scheduler.submit(jobs)
    return jobs, listeners


def answer(prompt, config=CONFIG, seed=0):
  request = Request(ids=prompt, seed=seed)
  return [written(request, config, len(prompt) + i) for i in range(config.gen_length)]


def until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.002)


def test_everybody_gets_his_own_answer_however_many_there_are():
  with Bench(slots=3) as bench:
    prompts = [[n + 1, 5] for n in range(40)]
    _, listeners = bench.submit(*prompts)
    for prompt, listener in zip(prompts, listeners, strict=True):
      assert listener.tokens() == answer(prompt)
    assert bench.engines[0].most == 3
    until(lambda: bench.scheduler.active == 0)
    # JAX is called from one thread only.
    assert len(bench.engines[0].threads) == 1


def test_a_request_joins_at_the_next_block():
  with Bench(gated=True) as bench:
    _, (first,) = bench.submit([1])
    until(lambda: bench.scheduler.active == 1)
    _, (second,) = bench.submit([2])
    assert bench.engines[0].most == 1  # the first block is being decoded
    bench.open_gate(1)
    until(lambda: bench.engines[0].most == 2)
    bench.open_gate()
    assert first.tokens() == answer([1]) and second.tokens() == answer([2])
    assert bench.engines[0].steps == 3  # and not 4: they shared a block


def test_samplers_have_lanes_that_take_turns():
  warm = SamplerConfig(gen_length=8, steps=8, block_length=4, temperature=0.5)
  with Bench() as bench:
    _, (cold_one,) = bench.submit([1])
    _, (warm_one,) = bench.submit([1], config=warm)
    assert cold_one.tokens() == answer([1]) != warm_one.tokens() == answer([1], warm)
    assert [engine.config for engine in bench.engines] == [CONFIG, warm]
    bench.submit([2])[1][0].tokens()
    assert len(bench.engines) == 2  # a lane stays for the next


def test_the_lane_idle_longest_makes_room_and_a_busy_one_does_not():
  configs = [SamplerConfig(gen_length=8, steps=8, block_length=4, temperature=t) for t in (0, 1, 2)]
  with Bench(max_lanes=2) as bench:
    for config in (configs[0], configs[1], configs[0], configs[2], configs[0]):
      bench.submit([1], config=config)[1][0].tokens()
    # The third lane took the place of the second, which had been idle longer than the first.
    assert [engine.config for engine in bench.engines] == configs
  with Bench(max_lanes=1, gated=True, slots=4) as bench:
    _, (first,) = bench.submit([1], config=configs[0])
    until(lambda: bench.scheduler.active == 1)
    _, (other,) = bench.submit([2], config=configs[1])
    _, (behind,) = bench.submit([3], config=configs[0])
    bench.open_gate(1)
    until(lambda: bench.engines[0].steps == 1)
    # There would be a slot for the third, but then the second might wait for ever.
    assert bench.engines[0].most == 1 and len(bench.engines) == 1
    bench.open_gate()
    assert first.tokens() and other.tokens() and behind.tokens()
    assert bench.engines[0].most == 1


def test_the_queue_is_bounded_and_takes_all_or_none():
  with Bench(gated=True, slots=1, max_queue=3) as bench:
    bench.submit([1])
    until(lambda: bench.scheduler.active == 1)
    bench.submit([2], [3])
    with pytest.raises(QueueFull, match="2 answers are waiting and 2 more.*3 may wait"):
      bench.submit([4], [5])
    assert bench.scheduler.waiting == 2
    _, (last,) = bench.submit([6])
    with pytest.raises(QueueFull):
      bench.submit([7])
    bench.open_gate()
    assert last.tokens() == answer([6])


def test_the_cancelled_leave_waiting_or_not_and_the_others_do_not_notice():
  with Bench(gated=True, slots=2) as bench:
    jobs, listeners = bench.submit([1], [2], [3], [4])
    until(lambda: bench.scheduler.active == 2)
    bench.scheduler.cancel([jobs[0], jobs[2]])
    bench.open_gate()
    assert listeners[1].tokens() == answer([2]) and listeners[3].tokens() == answer([4])
    assert not listeners[2].events and len(listeners[0].events) == 0
    assert len(bench.engines[0].cancelled) == 1
    assert bench.metrics.value("cancelled_total") == 2
    bench.scheduler.cancel([jobs[1]])  # it is done: nothing happens
    assert bench.submit([5])[1][0].tokens() == answer([5])


def test_the_cancelled_make_room_in_the_queue_at_once():
  with Bench(gated=True, slots=1, max_queue=1) as bench:
    bench.submit([1])
    until(lambda: bench.scheduler.active == 1)
    for prompt in ([2], [3], [4]):  # nothing is decoded meanwhile
      jobs, (left,) = bench.submit(prompt)
      bench.scheduler.cancel(jobs)
    _, (last,) = bench.submit([5])
    bench.open_gate()
    assert last.tokens() == answer([5]) and not left.events
    assert bench.metrics.value("cancelled_total") == 3 and not bench.engines[0].cancelled


def test_a_request_that_the_engine_refuses_fails_alone():
  with Bench() as bench:
    _, (bad, good) = bench.submit([0], [1])
    assert isinstance(bad.error(), Refused)
    assert good.tokens() == answer([1])


def test_a_failing_step_fails_its_rows_and_the_next_get_a_fresh_engine():
  with Bench(engine={"breaks": [(9,)]}) as bench:
    _, (broken,) = bench.submit([9])
    assert type(broken.error()) is ValueError
    assert bench.submit([1])[1][0].tokens() == answer([1])
    assert len(bench.engines) == 2 and bench.scheduler.alive


def test_the_cancelled_do_not_hear_of_a_failure():
  with Bench(gated=True, engine={"breaks": [(9,)]}) as bench:
    jobs, (left, broken) = bench.submit([1], [9])
    until(lambda: bench.scheduler.active == 2)
    bench.scheduler.cancel(jobs[:1])
    bench.open_gate()
    assert broken.error() and not left.events


def test_stopping_lets_the_last_answers_finish_and_takes_no_more():
  with Bench(gated=True, slots=1) as bench:
    _, listeners = bench.submit([1], [2])
    until(lambda: bench.scheduler.active == 1)
    stopping = threading.Thread(target=bench.scheduler.stop)
    stopping.start()
    until(lambda: not bench.scheduler.alive)
    with pytest.raises(Stopping):
      bench.submit([3])
    bench.open_gate()
    stopping.join(20)
    assert [listener.tokens() for listener in listeners] == [answer([1]), answer([2])]


def test_stopping_for_good_tells_those_who_wait():
  with Bench(gated=True, slots=1) as bench:
    _, listeners = bench.submit([1], [2])
    until(lambda: bench.scheduler.active == 1)
    stopping = threading.Thread(target=lambda: bench.scheduler.stop(timeout=0.05))
    stopping.start()
    time.sleep(0.2)
    bench.open_gate(1)  # the block that is being decoded
    stopping.join(20)
    assert all(isinstance(listener.error(), Stopping) for listener in listeners)


def test_a_thread_that_dies_tells_everybody():
  def nowhere():
    raise RuntimeError("no such mesh")

  scheduler = Scheduler(StandIn, context=nowhere)
  listener = Listener()
  scheduler._waiting.append(Job(config=CONFIG, request=Request(ids=[1]), listen=listener))
  scheduler.start()
  assert isinstance(listener.error(), Stopping)
  with pytest.raises(Stopping):
    scheduler.submit([])


def test_what_happens_is_counted():
  with Bench() as bench:
    for listener in bench.submit([1], [2])[1]:
      listener.tokens()
    until(lambda: bench.scheduler.active == 0)
    assert bench.metrics.value("tokens_written_total") == 16
    assert bench.metrics.value("block_seconds_count") == 2
    assert bench.metrics.value("queue_seconds_count") == 2
    text = bench.metrics.text().decode()
    assert "lladax_waiting 0.0" in text and "lladax_lanes 1.0" in text


@pytest.mark.parametrize("name", ["max_queue", "max_lanes"])
def test_bad_numbers_are_errors(name):
  with pytest.raises(ValueError, match=f"{name} is at least 1; got 0"):
    Scheduler(StandIn, **{name: 0})
