"""A run is disturbed ten times at random moments, and ends with the same parameters, bit for bit."""

from __future__ import annotations

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
from test_experiment import corpus, experiment  # noqa: F401

from lladax.config import to_json
from lladax.train import load_params, read_records
from lladax.train.checkpoint import saved_steps

STEPS, SAVE_EVERY = 60, 4
ROOT = pathlib.Path(__file__).parents[1]


def start(config, workdir, cache, *arguments):
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  return subprocess.Popen(
    [sys.executable, ROOT / "tests/chaos_run.py", to_json(config), workdir, *map(str, arguments)],
    env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def wait_until_it_trains(process, workdir, further: int):
  """Until it has taken so many steps from where it resumed."""
  before, deadline = newest(workdir), time.monotonic() + 200
  begin = time.time()
  while process.poll() is None and time.monotonic() < deadline:
    fresh = [r["step"] for r in read_records(workdir) if r["time"] >= begin]
    if fresh and max(fresh) >= min(before + further, STEPS - 1):
      return
    time.sleep(0.01)


def newest(workdir) -> int:
  return max(saved_steps(workdir), default=0)


def truncate_newest(workdir, moment):
  steps = saved_steps(workdir)
  if len(steps) < 2:
    return "nothing to truncate yet"
  files = [p for p in (workdir / "checkpoints" / str(steps[-1])).rglob("*") if p.is_file()]
  file = moment.choice(sorted(file for file in files if file.stat().st_size > 1))
  with open(file, "rb+") as opened:
    opened.truncate(file.stat().st_size // 2)
  return str(file.relative_to(workdir))


@pytest.mark.slow
def test_ten_disturbances_leave_no_trace(corpus, tmp_path):  # noqa: F811
  config = experiment(corpus, steps=STEPS, save_every=SAVE_EVERY, log_every=1, keep=3)
  undisturbed, disturbed, cache = (
    tmp_path / "undisturbed",
    tmp_path / "disturbed",
    tmp_path / "cache",
  )
  process = start(config, undisturbed, cache)
  assert process.wait(300) == 0, process.communicate()

  seed = random.randrange(10_000)
  moment = random.Random(seed)
  print(f"seed {seed}")
  kinds = ["SIGKILL"] * 4 + ["SIGTERM"] * 2 + ["full disk"] * 2 + ["truncated"] * 2
  moment.shuffle(kinds)
  for number, kind in enumerate(kinds):
    # Smaller than an array of the checkpoint: saves fail, as do records after a while.
    limit = [moment.choice([2_000, 20_000])] if kind == "full disk" else []
    process = start(config, disturbed, cache, *limit)
    if kind == "full disk":
      process.wait(300)
      assert process.returncode != 0, process.communicate()
    else:
      wait_until_it_trains(process, disturbed, moment.randrange(1, 2 * SAVE_EVERY))
      time.sleep(moment.random() * 0.2)
      process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
      process.wait(300)
    errors = process.communicate()[1]
    done = truncate_newest(disturbed, moment) if kind == "truncated" else ""
    print(f"{number}: {kind} {done}, status {process.returncode}, saved {saved_steps(disturbed)}")
    assert process.returncode in (0, 1, -signal.SIGKILL), errors[-2000:]
    if kind == "SIGTERM":  # in order: what it did is saved
      assert process.returncode == 0, errors[-2000:]

  process = start(config, disturbed, cache)
  assert process.wait(300) == 0, process.communicate()
  one, other = (load_params(path).params for path in (undisturbed, disturbed))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  losses = [
    [(r["step"], r["loss"]) for r in read_records(path) if "loss" in r]
    for path in (undisturbed, disturbed)
  ]
  assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
