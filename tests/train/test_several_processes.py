"""Two processes train one model as one process does, whatever lies on which of them, also killed."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import unittest.mock

import jax
import numpy as np
import pytest

from lladax.config import to_json
from lladax.data import DataConfig
from lladax.experiment import Experiment, open_run, train
from lladax.models import tiny
from lladax.moe import MoEConfig, Ring
from lladax.sharding import MeshConfig, make_mesh
from lladax.train import load_params, read_records

PROGRAM = pathlib.Path(__file__).with_name("one_of_several.py")
WORDS = "to be or not that is the question whether nobler in mind suffer slings and arrows".split()


def experiment(corpus) -> Experiment:
  moe = MoEConfig(
    num_experts=4, num_experts_per_tok=2, expert_intermediate_size=16, exchange=Ring()
  )
  return Experiment(
    name="several",
    model=tiny(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, moe=moe),
    data=DataConfig(corpus=str(corpus), length=32, batch_size=8, heldout=0.2),
    mesh=MeshConfig(data=1, expert=4),
    steps=4,
    log_every=1,
    eval_every=4,
    save_every=4,
  )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  rng = np.random.default_rng(0)
  corpus = tmp_path_factory.mktemp("corpus")
  for name in range(8):
    (corpus / f"{name}.txt").write_text(" ".join(rng.choice(WORDS, 120)))
  return corpus


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start(config, workdir, pause=0.0):
  """Two processes that train together."""
  arguments = [f"localhost:{free_port()}", "2"]
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  return [
    subprocess.Popen(
      [sys.executable, PROGRAM, *arguments, str(i), to_json(config), workdir, str(pause)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for i in range(2)
  ]


def finish(processes) -> list[list[dict]]:
  """What each said, once both have ended in order."""
  said = []
  for process in processes:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    said.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
  return said


def train_alone(config, workdir):
  with unittest.mock.patch(
    "lladax.experiment.run.make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:4])
  ):
    with open_run(config, workdir) as run:
      return jax.device_get(train(run).params)


def records(workdir):
  return [
    (record["step"], record["loss"], record["grad_norm"], np.mean(record["router_entropy"]))
    for record in read_records(workdir)
    if "loss" in record
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, rows",
  [
    (MeshConfig(data=1, expert=4), (4, 4)),  # the experts on devices of both
    (MeshConfig(data=1, context=4), (8, 8)),  # each row on devices of both, who feed the same
  ],
  ids=["expert", "context"],
)
def test_two_processes_train_as_one(corpus, tmp_path, mesh, rows):
  config = dataclasses.replace(experiment(corpus), mesh=mesh)
  said = finish(start(config, tmp_path / "two"))
  assert tuple(lines[-1]["rows"] for lines in said) == rows
  if mesh.expert > 1:
    first, second = (set(lines[-1]["experts"]) for lines in said)
    assert first and second and not first & second  # neither has the other's experts
  train_alone(config, tmp_path / "one")
  assert len(records(tmp_path / "two")) == 4
  np.testing.assert_allclose(records(tmp_path / "two"), records(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_one_of_two_is_killed_and_both_started_again(corpus, tmp_path):
  config = dataclasses.replace(experiment(corpus), steps=12, save_every=3)
  finish(start(config, tmp_path / "undisturbed"))

  processes = start(config, tmp_path / "killed", pause=0.5)
  deadline = time.monotonic() + 200
  while len(records(tmp_path / "killed")) < 5:
    assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGKILL)
  time.sleep(0.2)
  processes[0].kill()  # as a launcher does with the others, rather than wait for their time-out
  for process in processes:
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  assert (tmp_path / "killed" / "checkpoints" / "3").exists()
  assert records(tmp_path / "killed")[-1][0] < 12

  finish(start(config, tmp_path / "killed"))
  assert records(tmp_path / "killed") == records(tmp_path / "undisturbed")
  one, other = (load_params(tmp_path / name).params for name in ("killed", "undisturbed"))
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_a_preempted_pair_saves_and_goes_on(corpus, tmp_path):
  """SIGTERM to one of two: both end in order after the same step, which is saved."""
  config = dataclasses.replace(experiment(corpus), steps=40, save_every=30)
  processes = start(config, tmp_path, pause=0.3)
  deadline = time.monotonic() + 200
  while len(records(tmp_path)) < 2:
    assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
    time.sleep(0.05)
  processes[0].send_signal(signal.SIGTERM)
  finish(processes)
  (step,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
  assert 2 <= step < 30 and records(tmp_path)[-1][0] == step
  finish(start(dataclasses.replace(config, steps=step + 2), tmp_path))
  assert [record[0] for record in records(tmp_path)] == list(range(1, step + 3))
