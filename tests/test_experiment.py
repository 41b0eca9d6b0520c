"""The whole path, from a config to a trained workdir and back, on a toy text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import pytest

import lladax
from lladax.config import ConfigError, from_json, override, to_json
from lladax.data import DataConfig
from lladax.experiment import (
  Experiment,
  heldout_hook,
  open_run,
  run_command,
  train,
  with_special_ids,
)
from lladax.infer import SamplerConfig
from lladax.models import tiny
from lladax.moe import MoEConfig, Ring
from lladax.sharding import MeshConfig, make_mesh
from lladax.train import Constant, OptimizerConfig, every, heldout_bound, read_records

WORDS = "to be or not that is the question whether nobler in mind suffer slings and arrows".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  directory = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for name in range(8):
    text = " ".join(rng.choice(WORDS, 120))
    (directory / f"{name}.txt").write_text(text)
  return str(directory)


def experiment(corpus, **changes):
  moe = MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=16)
  model = tiny(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, moe=moe)
  config = Experiment(
    name="toy",
    model=model,
    data=DataConfig(corpus=corpus, length=32, batch_size=16, heldout=0.2),
    optimizer=OptimizerConfig(peak=1e-2, schedule=Constant(warmup=2)),
    sampler=SamplerConfig(gen_length=8, steps=4, block_length=8),
    steps=6,
    log_every=1,
    save_every=2,
    eval_every=3,
  )
  return dataclasses.replace(config, **changes)


@contextlib.contextmanager
def open_on_one_device(config, workdir):
  """`open_run` with a mesh of one of the eight devices: it compiles in a third of the time."""
  one = functools.partial(make_mesh, devices=jax.devices()[:1])
  with (
    unittest.mock.patch("lladax.experiment.run.make_mesh", one),
    open_run(config, workdir) as run,
  ):
    yield run


def losses(workdir):
  return [record["loss"] for record in read_records(workdir) if "loss" in record]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
  """(workdir, parameters, held-out bounds before and after) of a run that nothing happened to."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  with open_on_one_device(experiment(corpus), workdir) as run:
    evaluate = heldout_bound(run.config.model, run.data, run.mesh, mc_num=4)
    before = evaluate(run.state.params)

    def record(step, state):
      run.metrics.write(step, evaluate(state.params))

    state = train(run, [every(run.config.eval_every, record)])
    after = [evaluate(state.params) for _ in range(2)]
    params = jax.device_get(state.params)
  return workdir, params, (before, *after)


def test_the_loss_falls_and_every_part_leaves_its_record(trained, corpus):
  workdir, _, (before, after, again) = trained
  assert after["heldout/bits_per_byte"] < before["heldout/bits_per_byte"]
  assert after == again
  bits = after["heldout/nll"] * after["heldout/tokens"] / math.log(2)
  heldout = [r for r in read_records(workdir) if "heldout/nll" in r]
  assert [record["step"] for record in heldout] == [3, 6]
  assert heldout[-1]["heldout/nll"] == pytest.approx(after["heldout/nll"])
  with open_on_one_device(experiment(corpus), workdir) as run:
    assert bits / run.data.heldout_bytes == pytest.approx(after["heldout/bits_per_byte"])
  record = read_records(workdir)[0]
  assert np.sum(record["expert_load"], axis=-1) == pytest.approx([1.0])
  assert record["tokens"] == 16 * 32 and 0.3 < record["mask_rate"] < 0.7
  assert (workdir / "runs.jsonl").exists() and list((workdir / "tensorboard").iterdir())


def test_the_first_loss_is_that_of_guessing_and_the_initial_bound_too(trained):
  workdir, _, (before, *_) = trained
  assert read_records(workdir)[0]["masked_nll"] == pytest.approx(math.log(260), rel=0.05)
  assert before["heldout/nll"] == pytest.approx(math.log(260), rel=0.05)


def test_a_resumed_run_with_more_steps_has_the_losses_and_parameters_of_one_run(
  trained, corpus, tmp_path
):
  workdir, params, _ = trained
  with open_on_one_device(experiment(corpus, steps=3), tmp_path) as run:
    train(run)
  with open_on_one_device(experiment(corpus, keep=1), tmp_path) as run:
    assert int(run.state.step) == 3
    state = train(run)
  assert losses(tmp_path) == losses(workdir)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)


@pytest.mark.slow
def test_eight_devices_and_microbatches_give_the_losses_of_one(trained, corpus, tmp_path):
  with open_run(experiment(corpus, microbatches=2, steps=3), tmp_path) as run:
    assert run.mesh.size == 8
    train(run)
  # Balance is a mean of the microbatches' own, so it differs; the bound is the same sum.
  for name, tolerance in (("nll", 1e-4), ("mask_rate", 1e-6), ("masked_nll", 1e-4)):
    mine, whole = ([r[name] for r in read_records(w) if name in r] for w in (tmp_path, trained[0]))
    np.testing.assert_allclose(mine, whole[:3], rtol=tolerance)


def test_a_trace_has_the_steps_that_were_asked_for(corpus, tmp_path):
  config = experiment(corpus, profile_steps=(2, 3), save_every=9)
  with open_on_one_device(config, tmp_path) as run:
    train(run)
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  assert trace.stat().st_size > 1000
  record = read_records(tmp_path)[-1]
  assert record[f"epoch/{pathlib.Path(corpus).name}"] == pytest.approx(
    6 * 16 / len(run.data.train_rows)
  )
  assert record["tflops_per_second_per_device"] > 0 and "mfu" not in record


def test_the_facade_opens_what_was_trained(trained):
  workdir, params, _ = trained
  model = lladax.load(workdir)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), params)
  assert model.sampler.gen_length == 8
  assert isinstance(model.generate("to be "), str)
  sharded = lladax.load(workdir, mesh=MeshConfig(fsdp=2, expert=2), dtype="bfloat16")
  gate_up = sharded.params["layers"]["moe"]["gate_up"]
  assert gate_up.dtype == sharded.config.dtype == "bfloat16"
  assert gate_up.addressable_shards[0].data.size * 4 == gate_up.size
  # What was trained is saved in the published format and comes back with its tokenizer.
  model.save(workdir.parent / "exported")
  again = lladax.load(workdir.parent / "exported", progress=False)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), params)
  assert again.tokenizer.encode("to be") == model.tokenizer.encode("to be")


def test_special_ids_are_those_of_the_tokenizer(trained, corpus):
  config = from_json((trained[0] / "config.json").read_text())
  assert (config.model.mask_token_id, config.model.eos_token_id) == (257, 256)
  with open_on_one_device(experiment(corpus), trained[0]) as run:
    assert run.config == config == with_special_ids(experiment(corpus), run.data.tokenizer)


def test_an_experiment_survives_text(corpus):
  config = experiment(corpus)
  assert from_json(to_json(config)) == config
  changed = override(config, ["model.moe.num_experts=8", "objective.times=Band(low=0.1)"])
  assert (changed.model.moe.num_experts, changed.objective.times.low) == (8, 0.1)


# --- Bad input ---


def snapshot(workdir):
  return {path: path.stat().st_mtime_ns for path in pathlib.Path(workdir).rglob("*")}


def test_a_workdir_of_another_config_is_refused_and_left_alone(trained, corpus):
  workdir = trained[0]
  before = snapshot(workdir)
  with pytest.raises(ConfigError, match=r"\(optimizer.peak: 0.01 -> 0.5; seed: 0 -> 1\)"):
    other = override(experiment(corpus), ["seed=1", "optimizer.peak=0.5", "steps=9"])
    with open_on_one_device(other, workdir):
      pytest.fail("opened")
  assert snapshot(workdir) == before


def test_changed_text_is_noticed(corpus, tmp_path):
  directory = tmp_path / "text"
  directory.mkdir()
  for file in pathlib.Path(corpus).iterdir():
    (directory / file.name).write_text(file.read_text())
  config = experiment(str(directory), steps=3)
  with open_on_one_device(config, tmp_path / "run") as run:
    run.checkpoints.save(0, run.state)
  for file in directory.iterdir():
    file.write_text(file.read_text() + " more")
  with pytest.raises(ConfigError, match="text or its tokenizer changed"):
    with open_on_one_device(config, tmp_path / "run"):
      pytest.fail("opened")


@pytest.mark.parametrize(
  "assignments, parts",
  [
    (["data.corpus=/no/such/text"], ["/no/such/text"]),
    (["model.vocab_size=258", "data.tokenizer=bpe:300"], ["258", "vocab"]),
    (["data.batch_size=4"], ["4 rows", "8 devices"]),
    (["mesh.data=3"], ["3", "8"]),
    (["microbatches=3"], ["16", "3"]),
    (["data.length=4096"], ["data.length 4096", "256"]),
    (["optimizer.schedule=Wsd(warmup=9)"], ["6 updates", "9"]),
    (["sampler.block_length=3"], ["sampler", "block_length 3"]),
    (["model.moe.num_experts_per_tok=5"], ["model.moe", "5"]),
    (["stpes=3"], ["stpes", "'steps'", "save_every"]),
    (["save_every=0"], ["save_every", "0"]),
  ],
)
def test_mistakes_end_with_one_line_and_status_two(corpus, tmp_path, capsys, assignments, parts):
  def open_only(config, workdir):
    with open_run(config, workdir):
      pytest.fail("opened")

  status = run_command(
    experiment(corpus),
    {"train": open_only},
    workdir=str(tmp_path / "new"),
    assignments=assignments,
    mode="train",
  )
  error = capsys.readouterr().err.strip().splitlines()
  assert status == 2
  assert error[-1].startswith("error: ") and all(part in error[-1] for part in parts), error
  assert not (tmp_path / "new" / "checkpoints").exists()


SCRIPT = '''
"""A toy, to see the command."""
import sys
sys.path.insert(0, {tests!r})
from lladax.experiment import main
from test_experiment import experiment

def config():
  return experiment("shakespeare")

def train(config, workdir):
  print("training", config.steps, "steps in", workdir)

def evaluate(config, workdir):
  print("evaluating")

main(config, train, evaluate)
'''


def test_the_command_has_help_modes_and_one_line_errors(tmp_path):
  script = tmp_path / "toy.py"
  script.write_text(SCRIPT.format(tests=str(pathlib.Path(__file__).parent)))
  root = pathlib.Path(__file__).parents[1]
  environment = {**os.environ, "PYTHONPATH": str(root)}

  def start(*arguments):
    return subprocess.Popen(
      [sys.executable, str(script), *arguments],
      env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

  def finish(process):
    output, errors = process.communicate()
    return process.returncode, output, errors

  first, second = start("--help"), start("--set=steps=7", "--set=seed=2")
  status, output, errors = finish(first)
  text = " ".join(output.split())
  for part in ("A toy", "--workdir", "--mode", "optimizer.peak: float = 0.01", "data.corpus"):
    assert part in text, errors
  status, output, errors = finish(second)
  assert (status, output) == (0, "training 7 steps in runs/toy\nevaluating\n"), errors
  status, output, errors = finish(start("--set", "sede=2", "--mode=evaluate"))
  assert (status, output) == (2, "") and len(errors.strip().splitlines()) == 1, errors
  assert "sede" in errors and "'seed'" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
  "model, mesh, message",
  [
    (
      dict(moe=dict(exchange=Ring())),
      MeshConfig(data=1, expert=8),
      "4 experts do not divide over 8",
    ),
    (dict(num_key_value_heads=1), MeshConfig(fsdp=4, tensor=2), "1 key heads do not divide"),
    (
      dict(),
      MeshConfig(data=2, context=4),
      "2 heads .* do not divide over the 4 devices of the con",
    ),
    (dict(), MeshConfig(data=3), "needs 3 devices; there are 8"),
    (dict(), MeshConfig(fsdp=8), None),
  ],
)
def test_a_mesh_that_the_model_does_not_fit(corpus, tmp_path, model, mesh, message):
  config = experiment(corpus, mesh=mesh)
  model = dict(model)
  moe = dataclasses.replace(config.model.moe, **model.pop("moe", {}))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe, **model))
  if message is None:
    with open_run(config, tmp_path / "run") as run:
      assert run.state.step == 0
    return
  with pytest.raises(ConfigError, match=message), open_run(config, tmp_path / "run"):
    pass
  assert not (tmp_path / "run").exists()


def test_a_run_without_held_out_text_is_trained_and_not_scored(corpus, tmp_path):
  config = experiment(corpus, steps=3)
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=0.0))
  with open_on_one_device(config, tmp_path) as run:
    train(run, [heldout_hook(run)])
  records = read_records(tmp_path)
  assert len(losses(tmp_path)) == 3 and not any("heldout/nll" in record for record in records)
