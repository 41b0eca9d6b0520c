"""Laws of the loop: what is read when, what stops it, and that a stopped run continues the same."""

from __future__ import annotations

import logging
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run

from lladax.train.loop import NonFiniteError, Stopped, every, fit
from lladax.train.metrics import read_records
from lladax.train.state import TrainState
from lladax.types import Sums

ZERO = jnp.zeros((), jnp.int32)


def counting_step(log):
  def step(state, batch):
    log.append(("dispatch", int(state.step) + 1, batch))
    metrics = Sums({"loss": jnp.float32(int(state.step) + 1)}, {"loss": jnp.float32(1)})
    return state.replace(step=state.step + 1), metrics

  return step


def counting_state(step=0):
  return TrainState(jnp.int32(step), {}, (), ZERO, ZERO)


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read():
  log = []
  fit(
    counting_state(),
    iter("abcd"),
    counting_step(log),
    steps=4,
    readers=[lambda step, metrics, seconds: log.append(("read", step, metrics.sums["loss"]))],
    hooks=[every(2, lambda step, state: log.append(("hook", step, int(state.step))))],
  )
  order = [entry[:2] for entry in log]
  assert order == [
    ("dispatch", 1), ("dispatch", 2), ("read", 1), ("read", 2), ("hook", 2),
    ("dispatch", 3), ("dispatch", 4), ("read", 3), ("read", 4), ("hook", 4),
  ]  # fmt: skip
  assert all(entry[1] == entry[2] for entry in log if entry[0] in ("read", "hook"))
  assert [entry[2] for entry in log if entry[0] == "dispatch"] == list("abcd")


def test_steps_are_counted_from_the_beginning_of_the_run():
  log = []
  state = fit(counting_state(3), iter("abcd"), counting_step(log), steps=5)
  assert int(state.step) == 5 and [entry[1] for entry in log] == [4, 5]
  assert fit(counting_state(5), iter("a"), counting_step(log), steps=5).step == 5


def test_only_plain_steps_are_timed():
  timed = {}
  fit(
    counting_state(),
    iter(range(9)),
    counting_step([]),
    steps=7,
    readers=[lambda step, metrics, seconds: timed.update({step: seconds is not None})],
    hooks=[every(3, lambda step, state: None)],
  )
  # The first step compiles; a step after a hook has waited for it.
  assert timed == {1: False, 2: True, 3: True, 4: False, 5: True, 6: True, 7: False}


def test_hooks_at_the_end_run_once():
  ran = []
  hooks = [
    every(2, lambda step, state: ran.append(("both", step)), at_end=True),
    every(3, lambda step, state: ran.append(("end", step)), at_end=True),
    every(9, lambda step, state: ran.append(("never", step)), on_stop=True),
  ]
  fit(counting_state(), iter(range(9)), counting_step([]), steps=4, hooks=hooks)
  assert ran == [("both", 2), ("end", 3), ("both", 4), ("end", 4)]


def test_bad_hooks_and_data_that_end_are_refused():
  with pytest.raises(ValueError, match="got 0"):
    every(0, print)
  with pytest.raises(ValueError, match="ended at step 3 of 4"):
    fit(counting_state(), iter("ab"), counting_step([]), steps=4)


@pytest.mark.parametrize(
  "number, exception", [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_the_run_after_its_step_and_the_rest_is_the_same(tmp_path, number, exception):
  steps = 25
  expected = toy_run.run(tmp_path / "whole", steps)
  before = signal.getsignal(number)

  def interrupt(step, state):
    if step == 13:
      os.kill(os.getpid(), number)

  with pytest.raises(exception) as caught:
    toy_run.run(tmp_path / "cut", steps, hooks=[every(1, interrupt)])
  assert exception is not Stopped or caught.value.code == 0
  assert signal.getsignal(number) is before
  # The signal came while hooks of step 13 ran: it ends after 13 or 14, and is saved there.
  saved = {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()}
  assert saved == {"10", "14"}
  state = toy_run.run(tmp_path / "cut", steps)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  columns = ("step", "loss", "error", "columns", "grad_norm")
  whole, cut = (
    [{name: record[name] for name in columns} for record in read_records(tmp_path / name)]
    for name in ("whole", "cut")
  )
  assert whole == cut and [record["step"] for record in whole] == [7, 14, 21, 25]


def test_a_second_signal_has_its_usual_effect():
  def interrupt(step, state):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    pytest.fail("not reached")

  # A shell starts what runs in its background with SIGINT ignored; here it has its usual effect.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt):
      fit(counting_state(), iter("ab"), counting_step([]), steps=2, hooks=[every(1, interrupt)])
  finally:
    signal.signal(signal.SIGINT, before)


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    state = toy_run.run(tmp_path, 21, rows=toy_run.Rows(poison=(9, 10, 15)))
  assert (int(state.skipped_total), int(state.skipped_in_a_row)) == (3, 0)
  assert [f"step {step}: loss or gradient" in caplog.text for step in (10, 11, 12, 16)] == [
    True, True, False, True,
  ]  # fmt: skip
  records = read_records(tmp_path)
  assert [record["skipped"] for record in records] == [0, pytest.approx(2 / 7), 1 / 7]
  assert all(np.isfinite(record["loss"]) for record in records)


def test_too_many_in_a_row_stop_the_run_and_name_the_last_finite_checkpoint(tmp_path):
  rows = toy_run.Rows(poison=range(13, 99))
  with pytest.raises(NonFiniteError, match=r"in 4 steps in a row, up to step 17.*checkpoints/10"):
    toy_run.run(tmp_path, 40, rows=rows, limit=4)
  with pytest.raises(NonFiniteError, match="none was saved"):
    toy_run.run(tmp_path / "new", 40, rows=toy_run.Rows(poison=range(3, 9)), limit=4)
