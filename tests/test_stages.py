"""A run that begins where another ended: which checkpoint, and what goes with it."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_experiment import corpus, experiment, open_on_one_device, snapshot  # noqa: F401

import lladax
from lladax.config import ConfigError
from lladax.diffusion import Uniform
from lladax.experiment import AtStep, Best, Experiment, Latest, Start, chosen, run_command, train
from lladax.train import CheckpointError, Constant, OptimizerConfig, every, read_records


def values(state):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]


def equal(one, other):
  return all(np.array_equal(a, b) for a, b in zip(values(one), values(other), strict=True))


@pytest.fixture(scope="module")
def first(corpus, tmp_path_factory):  # noqa: F811
  """(workdir, final state, state of its data) of a first stage, evaluated at steps 2, 4 and 6."""
  workdir = tmp_path_factory.mktemp("stages") / "one"
  scores = {2: 3.0, 4: 1.0, 6: 2.0}
  with open_on_one_device(experiment(corpus, keep=3, keep_best=Best("score")), workdir) as run:
    evaluate = every(2, lambda step, _: run.metrics.write(step, {"score": scores[step]}))
    state = jax.device_get(train(run, [evaluate]))
    return workdir, state, run.batches.get_state()


def second(corpus, **start):  # noqa: F811
  return experiment(corpus, name="two", seed=1, steps=3, start=Start(**start))


def test_parameters_go_on_and_counters_begin(corpus, first, tmp_path):  # noqa: F811
  workdir, state, data = first
  with open_on_one_device(second(corpus, path=str(workdir)), tmp_path / "two") as run:
    assert equal(run.state.params, state.params) and int(run.state.step) == 0
    moments = [leaf for leaf in values(run.state.opt_state) if leaf.ndim]
    assert moments and not any(leaf.any() for leaf in moments)
    # The rows that were seen are not seen again.
    assert run.batches.start == data["drawn"] and run.batches.get_state()["next_index"] == 0
    first_batch = next(run.batches)
    end = train(dataclasses.replace(run, batches=run.batches))
    assert int(end.step) == 3
  with open_on_one_device(experiment(corpus), workdir) as run:
    np.testing.assert_array_equal(next(run.batches).tokens, first_batch.tokens)


def test_moments_are_kept_where_one_says_so_and_the_schedule_begins(
  corpus,  # noqa: F811
  first,
  tmp_path,
  monkeypatch,
):
  state = first[1]
  monkeypatch.chdir(first[0].parent)
  workdir = first[0].name  # relative to where the command is given
  warmup = OptimizerConfig(peak=1e-2, schedule=Constant(warmup=2))
  config = dataclasses.replace(
    second(corpus, path=str(workdir), optimizer="keep", data="restart"), optimizer=warmup
  )
  with open_on_one_device(config, tmp_path / "two") as run:
    old, new = (values(s.opt_state) for s in (state, run.state))
    assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True) if a.ndim)
    # The count of the moments' bias correction stays at 6, that of the schedule is 0 again.
    assert sorted(int(b) for b in new if not b.ndim) == [0, 6]
    assert run.batches.start == {}
    train(run)
  rates = [r["learning_rate"] for r in read_records(tmp_path / "two") if "learning_rate" in r]
  assert rates == pytest.approx([5e-3, 1e-2, 1e-2])


@pytest.mark.parametrize(
  "choice, step",
  [(Latest(), 6), (AtStep(2), 2), (Best("score"), 4), (Best("score", highest=True), 2)],
)
def test_the_checkpoint_that_is_asked_for(corpus, first, tmp_path, choice, step):  # noqa: F811
  config = second(corpus, path=str(first[0]), checkpoint=choice)
  with open_on_one_device(config, tmp_path / "two") as run:
    params = lladax.load(first[0] / "checkpoints" / str(step)).params
    assert equal(run.state.params, params)


@pytest.mark.slow
def test_the_best_checkpoint_outlives_newer_ones(corpus, tmp_path):  # noqa: F811
  scores = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0, 10: 4.0}
  config = experiment(corpus, steps=10, keep=1, keep_best=Best("score"))
  with open_on_one_device(config, tmp_path) as run:
    evaluate = every(2, lambda step, _: run.metrics.write(step, {"score": scores[step]}))
    train(run, [evaluate])
    run.checkpoints.wait()
    assert run.checkpoints.all_steps == [4, 10]


def test_a_start_is_the_same_again_after_a_kill_before_the_first_save(corpus, first, tmp_path):  # noqa: F811
  config = second(corpus, path=str(first[0]), checkpoint=Best("score"))
  with open_on_one_device(config, tmp_path / "two") as run:
    before = jax.device_get(run.state)
  # The first stage is evaluated again meanwhile, and another checkpoint is the best now.
  records = first[0] / "metrics.jsonl"
  text = records.read_text()
  try:
    records.write_text(text + json.dumps({"step": 6, "time": 0, "score": 0.5}) + "\n")
    with open_on_one_device(config, tmp_path / "two") as run:
      assert equal(before, run.state)
  finally:
    records.write_text(text)


def test_a_stage_is_the_workdir_beside(corpus, first, tmp_path):  # noqa: F811
  workdir = first[0].parent / "two"
  with open_on_one_device(second(corpus, stage="one"), workdir) as run:
    assert equal(run.state.params, first[1].params)


def test_released_weights_start_a_run(corpus, first, tmp_path):  # noqa: F811
  exported = tmp_path / "exported"
  lladax.load(first[0]).save(exported)
  config = second(corpus, path=str(exported))
  with open_on_one_device(config, tmp_path / "two") as run:
    assert equal(run.state.params, first[1].params) and run.batches.start == {}
  other = dataclasses.replace(config.model, hidden_size=64)
  with pytest.raises(ConfigError, match="hidden_size: 32 there, 64 here"):
    with open_on_one_device(dataclasses.replace(config, model=other), tmp_path / "three"):
      pytest.fail("opened")


@pytest.mark.slow
def test_a_run_goes_on_in_another_precision(corpus, first, tmp_path):  # noqa: F811
  """Kept in bfloat16 from here on: parameters and moments are the rounded ones."""
  with open_on_one_device(experiment(corpus, steps=3), tmp_path) as run:
    state = jax.device_get(train(run))
  config = experiment(corpus, steps=4)
  model = dataclasses.replace(config.model, dtype="bfloat16", param_dtype="bfloat16")
  with open_on_one_device(dataclasses.replace(config, model=model), tmp_path) as run:
    kernel = run.state.params["layers"]["moe"]["down"]
    assert kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(
      np.asarray(kernel), state.params["layers"]["moe"]["down"].astype(kernel.dtype)
    )
    train(run)


@pytest.mark.parametrize(
  "start, message",
  [
    (dict(path="/no/such/run"), "/no/such/run"),
    (dict(stage="zero"), "no checkpoint in .*zero to start from"),
    (dict(checkpoint=AtStep(3)), "no checkpoint of step 3, but of 2, 4, 6"),
    (dict(checkpoint=Best("loss/x")), "no record of these steps .* has 'loss/x'"),
  ],
)
def test_a_start_that_is_not_there_is_one_line(corpus, first, tmp_path, start, message):  # noqa: F811
  start = {"path": str(first[0])} | start
  if "stage" in start:
    del start["path"]
  before = snapshot(first[0])
  with pytest.raises((ConfigError, ValueError), match=message):
    with open_on_one_device(second(corpus, **start), tmp_path / "two"):
      pytest.fail("opened")
  assert not (tmp_path / "two").exists() and snapshot(first[0]) == before


def test_another_tokenizer_or_model_is_refused(corpus, first, tmp_path):  # noqa: F811
  config = second(corpus, path=str(first[0]))
  data = dataclasses.replace(config.data, tokenizer="bpe:260")
  with pytest.raises(ConfigError, match="tokenizer of the data is not that of"):
    with open_on_one_device(dataclasses.replace(config, data=data), tmp_path / "two"):
      pytest.fail("opened")
  model = dataclasses.replace(config.model, num_hidden_layers=2)
  with pytest.raises(CheckpointError, match="holds other arrays"):
    with open_on_one_device(dataclasses.replace(config, model=model), tmp_path / "two"):
      pytest.fail("opened")


@pytest.mark.parametrize("words", [{}, dict(path="a", stage="b"), dict(path="a", data="keep")])
def test_a_start_says_one_thing(words):
  with pytest.raises(ValueError, match="path|data"):
    Start(**words)


# --- Stages by name ---


def staged(stage="one", *, debug=False):
  from lladax.models import tiny

  return Experiment(name=f"toy/{stage}{'_debug' if debug else ''}", model=tiny(), steps=7)


def test_names_of_stages():
  names = [config.name for config in chosen(staged, ("one", "two"), "all:debug")]
  assert names == ["toy/one_debug", "toy/two_debug"]
  for text, name in (("", "toy/one"), ("two", "toy/two"), ("debug", "toy/one_debug")):
    assert [config.name for config in chosen(staged, ("one", "two"), text)] == [name]
  for text in ("three", "two:fast", "all:debug:x"):
    with pytest.raises(ConfigError, match="one of one, two, all, one:debug"):
      chosen(staged, ("one", "two"), text)
  with pytest.raises(ConfigError, match="no config 'debug'"):
    chosen(lambda: staged(), (), "debug")


def test_all_stages_run_in_order_each_in_its_directory(tmp_path):
  seen = []
  status = run_command(
    lambda: chosen(staged, ("one", "two"), "all"),
    {"train": lambda config, workdir: seen.append((config.name, config.seed, str(workdir)))},
    workdir=str(tmp_path),
    assignments=["seed=3"],
    mode="train",
  )
  assert status == 0
  assert seen == [("toy/one", 3, f"{tmp_path}/one"), ("toy/two", 3, f"{tmp_path}/two")]


@pytest.mark.slow
def test_a_run_goes_on_with_code_that_has_a_new_field(corpus, tmp_path):  # noqa: F811
  config = experiment(corpus, steps=3)
  with open_on_one_device(config, tmp_path) as run:
    train(run)
  for path in (tmp_path / "config.json", tmp_path / "checkpoints" / "3" / "run" / "config.json"):
    tree = json.loads(path.read_text())
    assert "guard" in tree
    del tree["guard"], tree["objective"]["times"]
    path.write_text(json.dumps(tree))
  with open_on_one_device(config, tmp_path) as run:
    assert int(run.state.step) == 3
  other = dataclasses.replace(
    config, objective=dataclasses.replace(config.objective, times=Uniform())
  )
  with pytest.raises(ConfigError, match="objective.times"):
    with open_on_one_device(other, tmp_path):
      pytest.fail("opened")
