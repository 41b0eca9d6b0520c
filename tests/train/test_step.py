"""Laws of the train step: microbatches, meshes and non-finite values."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lladax.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from lladax.train.state import abstract_state, init_state, state_shardings
from lladax.train.step import make_train_step, split_rows
from lladax.types import Sums

ROWS, WIDTH = 16, 4


def init_params(key):
  """Boxed with logical names, as Linen gives them."""
  kernel = jax.random.normal(key, (WIDTH, WIDTH))
  return {
    "kernel": nn.LogicallyPartitioned(kernel, ("embed", "mlp")),
    "scale": nn.LogicallyPartitioned(jnp.ones(WIDTH), ("norm",)),
  }


def prepare(batch, step):
  """Noise of each row from the step and the row's number only; weights divide over the batch."""
  key = jax.random.fold_in(jax.random.key(7), step)
  keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(ROWS))
  noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
  weight = jnp.arange(1.0, ROWS + 1)
  return {"x": batch["x"], "noise": noise, "weight": weight / weight.sum()}


def loss(params, examples, share):
  y = (examples["x"] + examples["noise"]) @ params["kernel"] * params["scale"]
  error = jnp.square(y - 1.0).sum(-1)
  regulariser = jnp.square(params["kernel"]).mean()
  total = (examples["weight"] * error).sum() + share * regulariser
  rows = jnp.full((), error.shape[0], jnp.float32)
  return total, Sums({"error": error.sum()}, {"error": rows})


def batch(seed=0):
  return {"x": np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(np.float32)}


@functools.cache
def run(*, microbatches=1, mesh_config=None, devices=8, steps=2):
  mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:devices])
  optimizer = optax.adamw(1e-2)
  with use_mesh(mesh):
    state = init_state(init_params, optimizer, 0, mesh)
    step = make_train_step(
      prepare,
      loss,
      optimizer,
      microbatches=microbatches,
      learning_rate=lambda count: 0.5 * count,
      shardings=state_shardings(state),
    )
    history = []
    for i in range(steps):
      placed = jax.device_put(batch(i), batch_sharding(mesh))
      state, metrics = step(state, placed)
      history.append(jax.device_get(metrics.means()))
  return state, history


def test_the_step_equals_a_plain_transcription():
  state, history = run(steps=1)
  params = nn.meta.unbox(init_params(jax.random.key(0)))
  examples = prepare(batch(0), jnp.zeros((), jnp.int32))
  expected, grads = jax.value_and_grad(lambda p: loss(p, examples, 1.0)[0])(params)
  optimizer = optax.adamw(1e-2)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(history[0]["loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(history[0]["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
  np.testing.assert_allclose(
    state.params["kernel"], optax.apply_updates(params, updates)["kernel"], rtol=1e-5
  )
  assert history[0]["learning_rate"] == 0.0 and history[0]["skipped"] == 0


@pytest.mark.parametrize("microbatches, devices", [(2, 8), (16, 1)])
def test_microbatches_give_the_step_of_the_whole_batch(microbatches, devices):
  whole, whole_history = run()
  split, split_history = run(microbatches=microbatches, devices=devices)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, split)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole_history, split_history
  )


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)])
def test_the_mesh_does_not_change_the_run(mesh_config):
  one, one_history = run(devices=1)
  many, many_history = run(mesh_config=mesh_config)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, many)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one_history, many_history)


def test_parameters_and_moments_lie_where_their_names_say():
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  optimizer = optax.adamw(1e-2)
  with use_mesh(mesh):
    state = init_state(init_params, optimizer, 0, mesh)
    abstract = abstract_state(init_params, optimizer, mesh)
  moment = state.opt_state[0].mu["kernel"]
  for kernel in (state.params["kernel"], moment):
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (1, 2)
  assert jax.tree.structure(abstract) == jax.tree.structure(state)
  for planned, made in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
    assert (planned.shape, planned.dtype) == (made.shape, made.dtype)
    assert planned.sharding.is_equivalent_to(made.sharding, made.ndim)


def test_a_microbatch_keeps_an_equal_share_of_rows_on_every_device():
  mesh = make_mesh()
  with use_mesh(mesh):
    rows = jax.device_put(jnp.arange(ROWS), batch_sharding(mesh))
    parts = jax.jit(lambda x: split_rows(x, 2))(rows)
    text = jax.jit(lambda x: split_rows(x, 2)).lower(rows).compile().as_text()
  np.testing.assert_array_equal(parts, np.arange(ROWS).reshape(-1, 2).T)
  assert parts.addressable_shards[0].data.shape == (2, 1)
  assert not any(name in text for name in ("all-to-all", "all-gather", "collective-permute"))


def test_rows_that_do_not_split_are_refused():
  with pytest.raises(ValueError, match="16 rows do not split into 3 microbatches"):
    run(microbatches=3)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(poison):
  def poisoned(params, examples, share):
    total, metrics = loss(params, examples, share)
    bad = examples["x"].sum() > 1e6
    if poison == "loss":
      return jnp.where(bad, jnp.nan, total), metrics
    # Finite value, infinite slope.
    return total + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * params["scale"].sum()), metrics

  mesh = make_mesh()
  optimizer = optax.adamw(1e-2)
  bad_batch = {"x": np.full((ROWS, WIDTH), 1e6, np.float32)}
  with use_mesh(mesh):
    state = init_state(init_params, optimizer, 0, mesh)
    step = make_train_step(prepare, poisoned, optimizer)
    state, _ = step(state, batch())
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, bad_batch)
    state, metrics = step(state, bad_batch)
    after = jax.device_get((state.params, state.opt_state))
    assert (int(state.step), int(state.skipped_in_a_row), int(state.skipped_total)) == (3, 2, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))
    assert float(metrics.counts["loss"]) == 0 and float(metrics.counts["error"]) == 0
    assert float(metrics.sums["skipped_in_a_row"]) == 2
    jax.tree.map(np.testing.assert_array_equal, before, after)
    state, metrics = step(state, batch())
  assert (int(state.skipped_in_a_row), int(state.skipped_total)) == (0, 2)
  assert float(metrics.counts["loss"]) == 1
