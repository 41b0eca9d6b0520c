"""Two processes train one model, its experts on devices of both, as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys
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
from lladax.train import read_records

PROGRAM = pathlib.Path(__file__).with_name("one_of_several.py")
WORDS = "to be or not that is the question whether nobler in mind suffer slings and arrows".split()


def experiment(corpus) -> Experiment:
  moe = MoEConfig(
    num_experts=4, num_experts_per_tok=2, expert_intermediate_size=16, exchange=Ring()
  )
  return Experiment(
    name="several",
    model=tiny(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, moe=moe),
    data=DataConfig(corpus=str(corpus), length=32, batch_size=8, heldout=0.2),
    mesh=MeshConfig(data=1, expert=4),
    steps=4,
    log_every=1,
    eval_every=4,
    save_every=4,
  )


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def records(workdir):
  return [
    (record["loss"], record["grad_norm"], np.mean(record["router_entropy"]))
    for record in read_records(workdir)
    if "loss" in record
  ]


@pytest.mark.slow
def test_two_processes_share_the_experts_and_train_as_one(tmp_path):
  rng = np.random.default_rng(0)
  corpus = tmp_path / "corpus"
  corpus.mkdir()
  for name in range(8):
    (corpus / f"{name}.txt").write_text(" ".join(rng.choice(WORDS, 120)))
  config = experiment(corpus)

  arguments = [f"localhost:{free_port()}", "2"]
  root = str(pathlib.Path(__file__).parents[2])
  environment = os.environ | {"PYTHONPATH": root}
  both = [
    subprocess.Popen(
      [sys.executable, PROGRAM, *arguments, str(i), to_json(config), tmp_path / "two"],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for i in range(2)
  ]
  said = []
  for process in both:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    said.append([json.loads(line)["experts"] for line in out.splitlines() if "experts" in line])
  first, second = (set(lines[-1]) for lines in said)
  assert first and second and not first & second  # neither has the other's experts

  with unittest.mock.patch(
    "lladax.experiment.run.make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:4])
  ):
    with open_run(config, tmp_path / "one") as run:
      train(run)
  assert len(records(tmp_path / "two")) == 4
  np.testing.assert_allclose(records(tmp_path / "two"), records(tmp_path / "one"), rtol=1e-5)
