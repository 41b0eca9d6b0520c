"""A run whose loss jumps goes back to a good checkpoint and on with other data, the same each time."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_experiment import corpus, experiment, open_on_one_device  # noqa: F401

from lladax.experiment import run_command, train
from lladax.train import (
  GuardConfig,
  GuardError,
  NonFiniteError,
  every,
  read_records,
  read_rollbacks,
)


class Poisoned:
  """Batches of a run, of which some are unlike any other; by number, whatever step takes them."""

  def __init__(self, batches, bad):
    self._batches, self._bad = batches, bad

  def __iter__(self):
    return self

  def __next__(self):
    number = self._batches.get_state()["next_index"]
    batch = next(self._batches)
    if number in self._bad:
      # A byte that is in no text: the loss jumps.
      batch = dataclasses.replace(batch, tokens=np.full_like(batch.tokens, 3))
    return batch

  def __getattr__(self, name):
    return getattr(self._batches, name)


GUARD = GuardConfig(spike=6.0, window=4, skip=1)


def run(corpus, workdir, bad, steps=12, hooks=(), **changes):  # noqa: F811
  config = experiment(corpus, steps=steps, save_every=2, keep=4, **{"guard": GUARD} | changes)
  with open_on_one_device(config, workdir) as opened:
    poisoned = Poisoned(opened.batches, bad)
    return jax.device_get(train(dataclasses.replace(opened, batches=poisoned), hooks).params)


def test_a_spike_is_undone_and_its_data_left_out(corpus, tmp_path):  # noqa: F811
  params = run(corpus, tmp_path / "spiked", bad={8})
  (rollback,) = read_rollbacks(tmp_path / "spiked")
  # Batch 8 is that of step 9; the checkpoint before is of step 8; batches 8 and 9 are left out.
  assert (rollback.first, rollback.seen, rollback.to, rollback.next_batch) == (9, 9, 8, 10)
  records = read_records(tmp_path / "spiked")
  assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
  assert max(r["masked_nll"] for r in records[8:]) < records[0]["masked_nll"] + 0.5
  # The same as a run whose data never had these batches.
  with open_on_one_device(
    experiment(corpus, steps=12, save_every=2, keep=4), tmp_path / "left_out"
  ) as opened:

    def leave_out(batches):
      for number in range(14):
        batch = next(batches)
        if number not in (8, 9):
          yield batch

    class Shorter:
      def __init__(self, batches):
        self._inner, self._left = batches, leave_out(batches)

      def __iter__(self):
        return self

      def __next__(self):
        return next(self._left)

      def __getattr__(self, name):
        return getattr(self._inner, name)

    other = train(dataclasses.replace(opened, batches=Shorter(opened.batches))).params
  jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(other))


class Killed(BaseException):
  pass


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):  # noqa: F811
  """(parameters, rollbacks) of a run that is set back and not killed."""
  workdir = tmp_path_factory.mktemp("whole")
  return run(corpus, workdir, bad={8}), read_rollbacks(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["set aside", "recorded", "restored", "going on"])
def test_killed_in_the_middle_of_a_step_back_it_ends_the_same(
  corpus,  # noqa: F811
  tmp_path,
  monkeypatch,
  moment,
  whole,
):
  def die(*_):
    raise Killed

  def then_die(function):
    def call(*arguments):
      function(*arguments)
      raise Killed

    return call

  from lladax.experiment import run as module

  with monkeypatch.context() as patch:
    if moment == "set aside":
      patch.setattr(module, "add_rollback", die)
    elif moment == "recorded":
      patch.setattr(module, "add_rollback", then_die(module.add_rollback))
    elif moment == "restored":
      patch.setattr(module, "_skip_to", die)
    hooks = []
    if moment == "going on":
      workdir = tmp_path / "k"
      hooks = [every(1, lambda step, _: die() if step == 9 and read_rollbacks(workdir) else None)]
    with pytest.raises(Killed):
      run(corpus, tmp_path / "k", bad={8}, hooks=hooks)
  again = run(corpus, tmp_path / "k", bad={8})
  jax.tree.map(np.testing.assert_array_equal, whole[0], again)
  assert read_rollbacks(tmp_path / "k") == whole[1]


@pytest.mark.slow
def test_without_a_guard_nothing_is_undone(corpus, tmp_path):  # noqa: F811
  run(corpus, tmp_path, bad={8}, guard=None)
  assert not (tmp_path / "rollbacks.jsonl").exists()


@pytest.mark.slow
def test_it_ends_when_it_was_set_back_too_often(corpus, tmp_path):  # noqa: F811
  guard = dataclasses.replace(GUARD, skip=0, max_rollbacks=2)
  with pytest.raises(GuardError, match="set back 2 times already"):
    run(corpus, tmp_path, bad=set(range(8, 20)), guard=guard)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_undone_where_one_says_so(corpus, tmp_path, monkeypatch):  # noqa: F811
  from lladax.experiment import run as module

  make = module.train_step

  def explode(*arguments):
    step = make(*arguments)
    calls = []

    def stepped(state, batch):
      calls.append(0)
      if 6 <= len(calls) <= 8:  # the sixth step, and two more
        state = dataclasses.replace(
          state, params=jax.tree.map(lambda x: x.at[...].set(np.nan), state.params)
        )
      return step(state, batch)

    return stepped

  monkeypatch.setattr(module, "train_step", explode)
  settings = dict(bad=set(), max_nonfinite=2)
  with pytest.raises(NonFiniteError):
    run(corpus, tmp_path / "ends", guard=None, **settings)
  params = run(corpus, tmp_path / "undone", **settings)
  (rollback,) = read_rollbacks(tmp_path / "undone")
  assert (rollback.first, rollback.seen, rollback.to) == (6, 7, 4)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_the_command_ends_with_status_one(corpus, tmp_path, capsys):  # noqa: F811
  def fail(config, workdir):
    raise GuardError("set back too often")

  status = run_command(
    experiment(corpus), {"train": fail}, workdir=str(tmp_path), assignments=[], mode="train"
  )
  assert status == 1 and capsys.readouterr().err == "error: set back too often\n"


@pytest.mark.slow
def test_the_watch_over_the_noise_goes_on_after_a_restart(corpus, tmp_path):  # noqa: F811
  with open_on_one_device(experiment(corpus, steps=4), tmp_path) as opened:
    train(opened)
    whole = opened.readers[0].get_state()
  assert np.sum(whole["sums"]["times all"][0]) == 4 * 16  # rows of four steps
  with open_on_one_device(experiment(corpus, steps=6), tmp_path) as opened:
    assert opened.readers[0].get_state() == json.loads(json.dumps(whole))
