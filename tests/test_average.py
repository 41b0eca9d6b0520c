"""Averages of checkpoints: the numbers, a whole workdir, and mistakes in one line."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent / "train"))
import toy_run

from lladax import average
from lladax.config import ConfigError
from lladax.sharding import make_mesh, use_mesh
from lladax.train import (
  Checkpoints,
  OptimizerConfig,
  abstract_state,
  ema_params,
  init_state,
  load_params,
  make_optimizer,
)

OPTIMIZER = make_optimizer(OptimizerConfig(ema=0.5), 10)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A workdir with five checkpoints, a config, a tokenizer and records of an evaluation."""
  workdir = tmp_path_factory.mktemp("run")
  mesh = make_mesh(devices=jax.devices()[:1])
  losses = {10: 3.0, 20: 1.0, 30: None, 40: 0.5, 50: 2.0}
  write = lambda folder: (folder / "words.txt").write_text("to be")  # noqa: E731
  with (
    use_mesh(mesh),
    Checkpoints(workdir / "checkpoints", files={"tokenizer": write}, keep=9) as checkpoints,
  ):
    for step in losses:
      state = init_state(toy_run.init_params, OPTIMIZER, step, mesh)
      checkpoints.save(step, state.replace(step=state.step + step))
  (workdir / "config.json").write_text("{}")
  lines = [json.dumps({"step": step, "heldout/nll": loss}) for step, loss in losses.items()]
  (workdir / "metrics.jsonl").write_text("\n".join(lines))
  return workdir


def params_at(workdir, step):
  return jax.tree.map(np.asarray, load_params(workdir / "checkpoints" / str(step)).params)


def test_the_average_is_that_of_the_parameters_and_a_workdir_of_its_own(source, tmp_path):
  target = tmp_path / "merged"
  assert average.main([f"--source={source}", "--last=3", f"--target={target}"]) == 0
  loaded = load_params(target)
  parts = [params_at(source, step) for step in (30, 40, 50)]
  for name in ("kernel", "scale"):
    want = sum(np.float64(part[name]) for part in parts) / 3
    np.testing.assert_allclose(loaded.params[name], want, rtol=1e-6, atol=1e-7)
  assert loaded.files("tokenizer").joinpath("words.txt").read_text() == "to be"
  record = json.loads((target / "average.json").read_text())
  assert record["steps"] == [30, 40, 50] and (target / "config.json").exists()
  assert not list(tmp_path.glob("*.new"))
  # Training goes on in it, with the moments and the counters of the last.
  mesh = make_mesh(devices=jax.devices()[:1])
  with use_mesh(mesh), Checkpoints(target / "checkpoints") as checkpoints:
    state = checkpoints.restore(abstract_state(toy_run.init_params, OPTIMIZER, mesh))
  assert int(state.step) == 50
  np.testing.assert_array_equal(state.params["kernel"], loaded.params["kernel"])


def test_paths_may_be_relative(source, tmp_path, monkeypatch):
  monkeypatch.chdir(source.parent)
  assert average.main([f"--source={source.name}", "--last=2", "--target=beside"]) == 0
  assert load_params(source.parent / "beside").path.name == "50"


def test_weights_steps_and_the_best(source, tmp_path):
  def merged(*flags):
    target = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
    assert average.main([f"--source={source}", f"--target={target}", *flags]) == 0
    return np.float64(load_params(target).params["kernel"])

  kernels = {step: np.float64(params_at(source, step)["kernel"]) for step in (10, 20, 40, 50)}
  got = merged("--steps=40,10", "--weights=0.25,0.75")
  np.testing.assert_allclose(got, 0.75 * kernels[10] + 0.25 * kernels[40], rtol=1e-5, atol=1e-7)
  got = merged("--best=2", "--metric=heldout/nll")
  np.testing.assert_allclose(got, (kernels[20] + kernels[40]) / 2, rtol=1e-5, atol=1e-7)
  # A running average that has seen no update is the parameters.
  np.testing.assert_allclose(merged("--ema"), kernels[50], rtol=1e-6)


def test_the_running_average_is_read_and_not_the_parameters(tmp_path):
  mesh = make_mesh(devices=jax.devices()[:1])
  with use_mesh(mesh), Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    state = init_state(toy_run.init_params, OPTIMIZER, 0, mesh)
    moved = jax.tree.map(lambda x: x + 1, state.params)
    checkpoints.save(1, state.replace(params=moved))
  average.average_checkpoints(tmp_path / "run", tmp_path / "ema", steps=[1], ema=True)
  got = load_params(tmp_path / "ema").params
  jax.tree.map(np.testing.assert_array_equal, got, ema_params(state))
  assert np.abs(got["kernel"] - moved["kernel"]).min() > 0.5


def test_weights_stand_for_a_decay():
  """An update made before checkpoint i counts the weights of all from i on."""
  for name, decay in (("equal", lambda x: 1 - x), ("sqrt", lambda x: 1 - np.sqrt(x))):
    weights = average.weights_of(name, 8)
    assert sum(weights) == pytest.approx(1)
    for i in range(8):
      assert sum(weights[i:]) == pytest.approx(decay(i / 8))


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--steps=10,35"], r"no checkpoint of steps \[35\]; it has \[10, 20, 30, 40, 50\]"),
    (["--steps=10,10"], r"averaged once; got \[10, 10\]"),
    (["--last=6"], "has 5 checkpoints .*; 6 are asked for"),
    (["--last=2", "--weights=0.5,0.6"], r"2 weights that add up to 1; got \[0.5, 0.6\]"),
    (["--last=2", "--weights=heavy"], "--weights=heavy: expected one of equal, sqrt or numbers"),
    (["--best=5"], "has 4 checkpoints with a record of 'heldout/nll'"),
  ],
  ids=str,
)
def test_mistakes_are_one_line_and_nothing_is_written(source, tmp_path, capsys, flags, message):
  import re

  target = tmp_path / "merged"
  assert average.main([f"--source={source}", f"--target={target}", *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error)
  assert not list(tmp_path.iterdir())


def test_a_target_that_is_there_and_an_average_that_is_not(source, tmp_path):
  with pytest.raises(ConfigError, match="is there already"):
    average.average_checkpoints(source, tmp_path, steps=[10])
  toy_run.run(tmp_path / "plain", 10)
  with pytest.raises(ConfigError, match="keeps no running average"):
    average.average_checkpoints(tmp_path / "plain", tmp_path / "ema", steps=[10], ema=True)
