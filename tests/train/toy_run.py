"""A run of a few hundred tiny steps, for the tests that end it at awkward moments.

As a program: `python toy_run.py WORKDIR STEPS [SAVE_THAT_KILLS]`. The save of that number kills
the process from within.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lladax.sharding import MeshConfig, make_mesh, use_mesh
from lladax.train.checkpoint import Checkpoints
from lladax.train.loop import every, fit, stop_on_nonfinite
from lladax.train.metrics import Metrics
from lladax.train.optimizer import OptimizerConfig, make_optimizer
from lladax.train.schedules import Constant
from lladax.train.state import abstract_state, init_state, state_shardings
from lladax.train.step import make_train_step
from lladax.types import Sums

WIDTH, ROWS = 8, 4
SAVE_EVERY, LOG_EVERY = 10, 7


class Rows:
  """Batches that are a function of (seed, step)."""

  def __init__(self, seed=0, poison=()):
    self.step, self._seed, self._poison = 0, seed, poison

  def __iter__(self):
    return self

  def __next__(self):
    rng = np.random.default_rng([self._seed, self.step])
    scale = np.inf if self.step in self._poison else 1.0
    self.step += 1
    return {"x": (scale * rng.normal(size=(ROWS, WIDTH))).astype(np.float32)}

  def get_state(self):
    return {"step": self.step}

  def set_state(self, state):
    self.step = state["step"]


def init_params(key):
  return {"kernel": jax.random.normal(key, (WIDTH, WIDTH)), "scale": jnp.ones(WIDTH)}


def prepare(batch, step):
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (ROWS, WIDTH))
  return {"x": batch["x"], "noise": noise}


def loss(params, examples, share):
  y = jnp.tanh((examples["x"] + examples["noise"]) @ params["kernel"]) * params["scale"]
  errors = jnp.square(y - examples["x"]).sum(-1)
  by_column = jnp.square(y).sum(0)
  rows = jnp.float32(ROWS)
  return share * errors.mean(), Sums(
    {"error": errors.sum(), "columns": by_column}, {"error": rows, "columns": rows}
  )


def run(workdir, steps, *, hooks=(), rows=None, files=None, limit=5, pause=0.0):
  """Trains or resumes in `workdir`, and returns the final state."""
  optimizer = make_optimizer(OptimizerConfig(peak=1e-2, schedule=Constant()), steps)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  rows = rows or Rows()
  with (
    use_mesh(mesh),
    Metrics(workdir, steps=steps, every=LOG_EVERY, tokens_per_step=ROWS, show=False) as metrics,
    Checkpoints(
      pathlib.Path(workdir) / "checkpoints",
      iterators={"data": rows, "metrics": metrics},
      files=files,
    ) as checkpoints,
  ):
    state = checkpoints.restore(abstract_state(init_params, optimizer, mesh))
    if state is None:
      state = init_state(init_params, optimizer, 0, mesh)
    metrics.start(int(state.step))
    step = make_train_step(prepare, loss, optimizer, shardings=state_shardings(state))
    return fit(
      state,
      rows,
      step,
      steps=steps,
      readers=[metrics, stop_on_nonfinite(limit, checkpoints)],
      hooks=[
        every(1, lambda step, state: time.sleep(pause)),
        *hooks,
        every(SAVE_EVERY, checkpoints.save, at_end=True, on_stop=True),
      ],
    )


def main(workdir: str, steps: str, save_that_kills: str = "0"):
  saves = 0

  def write(directory):
    nonlocal saves
    saves += 1
    (directory / "words.txt").write_text("to be")
    if saves == int(save_that_kills):
      os.kill(os.getpid(), signal.SIGKILL)

  run(workdir, int(steps), files={"words": write}, pause=0.01)
  print("finished")


if __name__ == "__main__":
  main(*sys.argv[1:])
