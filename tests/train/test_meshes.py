"""Ten steps of a whole experiment take the same course on every mesh, with every exchange."""

import dataclasses
import functools
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.data import DataConfig
from lladax.diffusion import BatchLoad, PreviousLoad
from lladax.experiment import Experiment, train_step
from lladax.models import init_variables, tiny
from lladax.moe import AllToAll, Fsdp, MoEConfig, Ragged, Ring, TopKSoftmax
from lladax.sharding import MeshConfig, make_mesh, use_mesh
from lladax.train import (
  AdamW,
  BiasUpdate,
  Constant,
  Muon,
  OptimizerConfig,
  ema_params,
  init_state,
  make_optimizer,
  place,
  state_shardings,
  warn_of_drops,
)
from lladax.train.step import split_rows
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
    pytest.param(Fsdp(), MeshConfig(fsdp=2, expert=2, context=2), marks=pytest.mark.slow),
    pytest.param(
      Ring(buffer_factor=1.5), MeshConfig(data=1, expert=4, tensor=2), marks=pytest.mark.slow
    ),
    pytest.param(AllToAll(), MeshConfig(data=2, fsdp=2, expert=2), marks=pytest.mark.slow),
    pytest.param(Ragged(), MeshConfig(data=1, expert=4), marks=pytest.mark.slow),
  ],
  ids=lambda x: repr(x).split("(")[0],
)
def test_ten_steps_do_not_depend_on_the_mesh(exchange, mesh):
  devices = abs(np.prod(mesh.sizes)) if -1 not in mesh.sizes else 8
  got = course(experiment(exchange), make_mesh(mesh, jax.devices()[:devices]))
  np.testing.assert_allclose(got, on_one_device(), rtol=2e-5)


# data x model-parallel
GRIDS = {
  "1x1": MeshConfig(data=1),
  "8x1": MeshConfig(data=8),
  "2x4": MeshConfig(data=2, expert=2, tensor=2),
  "4x2": MeshConfig(data=1, fsdp=4, context=2),
}


def mesh_of(name: str):
  config = GRIDS[name]
  return make_mesh(config, jax.devices()[: int(np.prod(config.sizes))])


def rows_of(count: int) -> Batch:
  parts = [batch(seed) for seed in range(count // B)]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@functools.cache
def noised(name: str, microbatches: int):
  """The parts of step 3's batch, its noise included, as they enter the network."""
  config = experiment(Fsdp())
  with use_mesh(mesh_of(name)) as mesh:

    @jax.jit
    def parts(batch, step):
      noise = config.objective.noise(batch, config.seed, step, mask_id=config.model.mask_token_id)
      return split_rows(noise, microbatches)

    parts = jax.device_get(parts(place(rows_of(32), mesh), 3))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(32, *x.shape[2:]), parts)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("name", GRIDS)
def test_tokens_and_masks_do_not_depend_on_mesh_or_microbatches(name, microbatches):
  got, want = noised(name, microbatches), noised("1x1", 1)
  assert 0.2 < want.is_masked.mean() < 0.8
  for field in ("tokens", "is_masked", "t", "mask_rate"):
    np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
  np.testing.assert_allclose(got.weights, want.weights, rtol=1e-6)


@functools.cache
def two_steps(name: str, microbatches: int, balance_load=BatchLoad()):  # noqa: B008
  """Metrics of two steps of a batch with a balance loss that matters."""
  base = experiment(Fsdp())
  config = dataclasses.replace(
    base,
    # Weights of every size, so that routing is far from even.
    model=dataclasses.replace(base.model, initializer_range=0.5),
    objective=dataclasses.replace(base.objective, balance_loss=1.0, balance_load=balance_load),
    data=dataclasses.replace(base.data, batch_size=32),
    microbatches=microbatches,
  )
  optimizer = make_optimizer(config.optimizer, config.steps)
  with use_mesh(mesh_of(name)) as mesh:
    state = init_state(
      lambda key: init_variables(config.model, key)["params"], optimizer, config.seed, mesh
    )
    step, out = train_step(config, state_shardings(state)), []
    for _ in range(2):
      state, metrics = step(state, place(rows_of(32), mesh))
      out.append(jax.device_get(metrics.means()))
    out.append({"load_share": np.asarray(state.load_share)})
  return out


def assert_same_steps(got, want, rtol=5e-5):
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for name, value in b.items():
      np.testing.assert_allclose(a[name], value, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  "name, microbatches",
  [("2x4", 2)]
  + [
    pytest.param(name, parts, marks=pytest.mark.slow)
    for name in GRIDS
    for parts in (1, 2, 4)
    if (name, parts) not in (("2x4", 2), ("1x1", 1))
  ],
)
def test_losses_do_not_depend_on_mesh_or_microbatches(name, microbatches):
  want = two_steps("1x1", 1)
  assert want[0]["balance_loss"] > 1.02
  assert_same_steps(two_steps(name, microbatches), want)


@pytest.mark.slow
@pytest.mark.parametrize("name, microbatches", [("1x1", 4), ("4x2", 2)])
def test_losses_with_the_load_of_the_step_before_do_not_either(name, microbatches):
  want = two_steps("1x1", 1, PreviousLoad())
  # Equal shares at the first step: nothing to press against.
  assert want[0]["balance_loss"] == pytest.approx(1, abs=1e-5)
  assert want[1]["balance_loss"] > 1.02
  # AdamW's first update is the sign of a gradient: rounding matters where that is nearly 0.
  assert_same_steps(two_steps(name, microbatches, PreviousLoad()), want, rtol=3e-4)


def three_steps(config: Experiment, mesh):
  optimizer = make_optimizer(config.optimizer, config.steps)
  with use_mesh(mesh):
    state = init_state(
      lambda key: init_variables(config.model, key)["params"], optimizer, config.seed, mesh
    )
    step = train_step(config, state_shardings(state))
    for i in range(3):
      state, _ = step(state, place(batch(i), mesh))
  return state


@pytest.mark.slow
def test_muon_biases_and_the_average_do_not_depend_on_the_mesh():
  base = experiment(Fsdp())
  moe = dataclasses.replace(base.model.moe, router=TopKSoftmax(expert_bias=True))
  config = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, moe=moe, initializer_range=0.2),
    optimizer=OptimizerConfig(
      peak=1e-2, rule=Muon(others=AdamW(eps=1e-3)), ema=0.9, bias_update=BiasUpdate(rate=0.01)
    ),
  )
  one = three_steps(config, make_mesh(devices=jax.devices()[:1]))
  many = three_steps(config, make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2)))
  for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
  bias = np.asarray(one.params["layers"]["moe"]["expert_bias"])
  assert 0.015 < np.abs(bias).max() < 0.05
  np.testing.assert_allclose(bias.sum(-1), 0, atol=1e-6)
  # The average lies on the devices as the parameters do.
  for average, x in zip(
    jax.tree.leaves(ema_params(many)), jax.tree.leaves(many.params), strict=True
  ):
    assert average.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_bfloat16_compute_has_float32_master_weights():
  base = experiment(Fsdp())
  config = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, dtype="bfloat16", param_dtype="float32"),
    # Far below what bfloat16 resolves of weights of 0.02.
    optimizer=OptimizerConfig(peak=1e-6, schedule=Constant(), weight_decay=0.0, ema=0.9),
  )
  optimizer = make_optimizer(config.optimizer, config.steps)
  with use_mesh(make_mesh(devices=jax.devices()[:1])) as mesh:
    state = init_state(
      lambda key: init_variables(config.model, key)["params"], optimizer, config.seed, mesh
    )
    before = jax.device_get(state.params)
    step = train_step(config, state_shardings(state))
    text = step.lower(state, place(batch(0), mesh)).as_text()
    state, _ = step(state, place(batch(0), mesh))
  floats = [x for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.floating)]
  assert {x.dtype.name for x in floats} == {"float32"}  # parameters, moments, the average
  assert "xbf16>" in text  # and yet products are of bfloat16
  kernel = [np.asarray(p["layers"]["moe"]["down"]) for p in (before, state.params)]
  moved = kernel[0] != kernel[1]
  assert moved.mean() > 0.5
  same = kernel[0].astype(jnp.bfloat16) == kernel[1].astype(jnp.bfloat16)
  assert (moved & same).mean() > 0.4  # steps that would be lost without them


@pytest.mark.slow
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
