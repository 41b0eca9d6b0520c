"""A run that is killed, at any moment, ends as if it had not been: real processes, real signals."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy_run

from lladax.train.checkpoint import load_params
from lladax.train.metrics import read_records

STEPS = 200


def start(workdir, *arguments):
  root = pathlib.Path(__file__).parents[2]
  environment = {**os.environ, "PYTHONPATH": str(root)}
  return subprocess.Popen(
    [sys.executable, toy_run.__file__, str(workdir), str(STEPS), *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_step(process, workdir, step):
  """Until this process, not one before it, has taken the step."""
  deadline, begin = time.monotonic() + 120, time.time()
  while not any(r["step"] >= step and r["time"] > begin for r in read_records(workdir)):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.002)


def steps_saved(workdir):
  directory = pathlib.Path(workdir) / "checkpoints"
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def losses(workdir):
  """What the records say, without what depends on the clock."""
  timed = ("time", "steps_per_second", "tokens_per_second")
  return [
    {name: value for name, value in record.items() if name not in timed}
    for record in read_records(workdir)
  ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  # In this process: the files are written by the same code, the numbers are the same.
  state = toy_run.run(workdir, STEPS)
  return jax.device_get(state), losses(workdir)


def test_killed_runs_resume_to_the_same_losses_and_parameters(uninterrupted, tmp_path):
  expected, expected_losses = uninterrupted
  seed = random.randrange(1000)
  print(f"seed {seed}")
  moment = random.Random(seed)

  process = start(tmp_path)
  wait_for_step(process, tmp_path, moment.randrange(30, 60))
  time.sleep(moment.random() * 0.1)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL

  # From inside a save: the files are there, the checkpoint is not.
  process = start(tmp_path, 3)
  _, errors = process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert list((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

  process = start(tmp_path)
  wait_for_step(process, tmp_path, max(steps_saved(tmp_path)) + moment.randrange(8, 20))
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  assert "stopped after step" in errors and "SIGTERM" in errors and "Traceback" not in errors
  stopped = int(errors.split("stopped after step ")[1].split()[0])
  assert steps_saved(tmp_path)[-1] == stopped < STEPS

  process = start(tmp_path)
  output, errors = process.communicate()
  assert process.returncode == 0 and "finished" in output, errors
  assert losses(tmp_path) == expected_losses
  assert [record["step"] for record in expected_losses] == [*range(7, STEPS, 7), STEPS]
  loaded = load_params(tmp_path)
  assert loaded.path.name == str(STEPS)
  assert (loaded.files("words") / "words.txt").read_text() == "to be"
  jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert all(json.loads(line) for line in lines)
