"""Ten steps of a whole experiment take the same course on every mesh, with every exchange."""

import dataclasses
import functools
import unittest.mock

import jax
import numpy as np
import pytest

from lladax.data import DataConfig
from lladax.experiment import Experiment, train_step
from lladax.models import init_variables, tiny
from lladax.moe import AllToAll, Fsdp, MoEConfig, Ragged, Ring
from lladax.sharding import MeshConfig, make_mesh, use_mesh
from lladax.train import (
  OptimizerConfig,
  init_state,
  make_optimizer,
  place,
  state_shardings,
  warn_of_drops,
)
from lladax.types import Batch

B, L, V, STEPS = 8, 16, 64, 10


def experiment(exchange) -> Experiment:
  moe = MoEConfig(
    num_experts=8, num_experts_per_tok=2, expert_intermediate_size=8, exchange=exchange
  )
  model = tiny(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, moe=moe)
  return Experiment(
    name="toy",
    model=dataclasses.replace(model, remat="full"),
    data=DataConfig(corpus="python", length=L, batch_size=B),
    optimizer=OptimizerConfig(peak=1e-2),
    steps=STEPS,
  )


def batch(step: int) -> Batch:
  rng = np.random.default_rng(step)
  segments = np.where(np.arange(L) < rng.integers(1, L, (B, 1)), 1, 2)
  segments[0, -3:] = 0  # padding
  start = np.argmax(segments == 2, axis=1)[:, None]
  positions = np.where(segments == 2, np.arange(L) - start, np.arange(L))
  return Batch(
    tokens=rng.integers(4, V, (B, L)).astype(np.int32),
    segment_ids=segments.astype(np.int32),
    positions=positions.astype(np.int32),
    maskable=segments > 0,
  )


def course(config: Experiment, mesh) -> np.ndarray:
  """Loss and gradient norm of every step."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  with use_mesh(mesh):
    state = init_state(
      lambda key: init_variables(config.model, key)["params"], optimizer, config.seed, mesh
    )
    step = train_step(config, state_shardings(state))
    out = []
    for i in range(STEPS):
      state, metrics = step(state, place(batch(i), mesh))
      out.append([metrics.sums["loss"], metrics.sums["grad_norm"]])
  return np.asarray(out)


@functools.cache
def on_one_device() -> np.ndarray:
  return course(experiment(Fsdp()), make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
  "exchange, mesh",
  [
    (Fsdp(), MeshConfig(fsdp=2, expert=2, context=2)),
    (Ring(buffer_factor=1.5), MeshConfig(data=1, expert=4, tensor=2)),
    pytest.param(AllToAll(), MeshConfig(data=2, fsdp=2, expert=2), marks=pytest.mark.slow),
    pytest.param(Ragged(), MeshConfig(data=1, expert=4), marks=pytest.mark.slow),
  ],
  ids=lambda x: repr(x).split("(")[0],
)
def test_ten_steps_do_not_depend_on_the_mesh(exchange, mesh):
  devices = abs(np.prod(mesh.sizes)) if -1 not in mesh.sizes else 8
  got = course(experiment(exchange), make_mesh(mesh, jax.devices()[:devices]))
  np.testing.assert_allclose(got, on_one_device(), rtol=2e-5)


def test_dropped_slots_are_recorded():
  config = experiment(AllToAll(buffer_factor=0.25, on_overflow="drop"))
  mesh = make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])
  with use_mesh(mesh):
    state = init_state(
      lambda key: init_variables(config.model, key)["params"],
      make_optimizer(config.optimizer, STEPS),
      config.seed,
      mesh,
    )
    _, metrics = train_step(config, state_shardings(state))(state, place(batch(0), mesh))
  # At least three quarters of the slots of two layers find no room: two experts, B * L tokens.
  assert metrics.sums["dropped_slots"] >= 0.75 * 2 * 2 * B * L - 2 * 4
  assert metrics.counts["dropped_slots"] == 1
  with unittest.mock.patch("absl.logging.warning") as warning:
    warn_of_drops(1, metrics, None)
    assert "not computed" in warning.call_args.args[0]
