"""Laws of the guards: what is a spike, and where a run goes on, killed or not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.train.guards import (
  GuardConfig,
  GuardError,
  Rollback,
  Spike,
  SpikeGuard,
  add_rollback,
  plan_rollback,
  read_rollbacks,
)
from lladax.types import Sums

CONFIG = GuardConfig(window=20, spike=8.0)


def sums(value, count=1.0):
  return Sums({"masked_nll": np.float32(value * count)}, {"masked_nll": np.float32(count)})


def losses(steps, seed=0):
  rng = np.random.default_rng(seed)
  return 3 + 2 * np.exp(-np.arange(steps) / 50) + 0.1 * rng.normal(size=steps)


def feed(guard, values, first=1):
  for step, value in enumerate(values, start=first):
    guard(step, sums(value), None)


def test_a_jump_is_a_spike_and_says_where_it_began():
  values = losses(100)
  values[60:] += 5
  guard = SpikeGuard(CONFIG)
  with pytest.raises(Spike, match=r"step 61: masked_nll 8\.\d+ is above .* 8 deviations") as caught:
    feed(guard, values)
  assert (caught.value.first, caught.value.seen, caught.value.good) == (61, 61, 60)
  feed(SpikeGuard(GuardConfig(window=20, spike=None)), values)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_noise_and_a_falling_loss_are_none(seed):
  # Of a window of 20 steps the deviation is known too badly: 1% of such runs have a false alarm.
  feed(SpikeGuard(GuardConfig(window=100, spike=8.0)), losses(400, seed))


def test_the_bound_is_of_the_median_and_not_of_outliers():
  values = losses(40)
  values[30] = 1e6  # one that is let pass, as patience has it
  guard = SpikeGuard(GuardConfig(window=20, spike=8.0, patience=2))
  feed(guard, values)
  good = np.delete(values, 30)[-20:].astype(np.float32).astype(np.float64)
  deviation = 1.4826 * np.median(np.abs(good - np.median(good)))
  assert guard.bound() == pytest.approx(np.median(good) + 8 * deviation, rel=1e-6)


def test_patience_waits_for_bad_steps_in_a_row():
  guard = SpikeGuard(GuardConfig(window=20, spike=8.0, patience=3))
  values = losses(30)
  feed(guard, values)
  feed(guard, [50, 50, 3.5, 50, 50], first=31)
  with pytest.raises(Spike) as caught:
    guard(36, sums(50), None)
  assert (caught.value.first, caught.value.seen) == (34, 36)


def test_equal_losses_are_no_reason():
  guard = SpikeGuard(CONFIG)
  feed(guard, [1.0] * 30)
  guard(31, sums(1.005), None)
  with pytest.raises(Spike):
    guard(32, sums(1.02), None)


def test_skipped_steps_are_passed_over_and_unknown_metrics_named():
  guard = SpikeGuard(CONFIG)
  feed(guard, losses(30))
  before = guard.get_state()
  guard(31, Sums({"masked_nll": np.float32(0)}, {"masked_nll": np.float32(0)}), None)
  assert guard.get_state() == before
  with pytest.raises(KeyError, match="'perplexity' is none of masked_nll"):
    SpikeGuard(GuardConfig(metric="perplexity"))(1, sums(1), None)


def test_a_restart_decides_the_same():
  values = losses(60)
  values[50:] += 5
  whole, cut = SpikeGuard(CONFIG), SpikeGuard(CONFIG)
  feed(whole, values[:45])
  feed(cut, values[:30])
  state = json.loads(json.dumps(cut.get_state()))
  again = SpikeGuard(CONFIG)
  again.set_state(state)
  feed(again, values[30:45], first=31)
  assert again.get_state() == whole.get_state() and again.bound() == whole.bound()


def spike(first, seen=None):
  return Spike("a spike", first=first, seen=seen or first)


def test_a_run_goes_back_to_the_newest_checkpoint_before_and_on_after_what_it_saw():
  plan = plan_rollback(CONFIG, spike(61, 63), [20, 40, 60])
  assert (plan.to, plan.next_batch) == (60, 63)
  config = GuardConfig(back=10, skip=5)
  plan = plan_rollback(config, spike(61, 63), [20, 40, 60])
  assert (plan.to, plan.next_batch) == (40, 68)
  # Step 41 now takes batch 68, step n batch n + 27: the last before an alarm at step 95 is batch 122.
  again = plan_rollback(config, spike(95), [20, 40, 60, 80], [plan])
  assert (again.to, again.next_batch) == (80, 122 + 1 + 5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=5))
def test_no_batch_that_was_seen_before_an_alarm_is_taken_again(alarms):
  """By walking through the run: batches taken after a step back are new."""
  config = GuardConfig(skip=2, max_rollbacks=10)
  past, step, next_batch, seen = [], 0, 0, set()
  for good, late in alarms:
    taken = []
    for _ in range(good + 1 + late):
      taken.append(next_batch)
      step, next_batch = step + 1, next_batch + 1
    assert not seen & set(taken)
    seen |= set(taken)
    saved = range(0, step + 1, 4)  # step 0: the beginning
    plan = plan_rollback(config, spike(step - late, step), saved, past)
    assert plan.to <= step - late - 1 and plan.next_batch > max(seen)
    past.append(plan)
    step, next_batch = plan.to, plan.next_batch


def test_there_is_an_end_to_it():
  plan = plan_rollback(CONFIG, spike(61), [60])
  with pytest.raises(GuardError, match="set back 3 times already"):
    plan_rollback(CONFIG, spike(61), [60], [plan] * 3)
  with pytest.raises(GuardError, match=r"no checkpoint is from step 60 or before.*\[80\]"):
    plan_rollback(CONFIG, spike(61), [80])
  with pytest.raises(GuardError, match="there are none"):
    plan_rollback(CONFIG, spike(61), [])


def test_records_come_back(tmp_path):
  assert read_rollbacks(tmp_path) == []
  records = [Rollback(first=i, seen=i + 1, to=i - 1, next_batch=9, reason="r") for i in (5, 7)]
  for record in records:
    add_rollback(tmp_path, record)
  assert read_rollbacks(tmp_path) == records


@pytest.mark.parametrize(
  "changes", [dict(spike=-1.0), dict(window=2), dict(skip=-1), dict(max_rollbacks=0)], ids=str
)
def test_bad_numbers_are_refused_with_their_value(changes):
  (value,) = changes.values()
  with pytest.raises(ValueError, match=f"got {value}"):
    GuardConfig(**changes)
