"""The MoE layer against a dense one-hot transcription, on one device and on a mesh of eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.moe import MoEConfig, MoELayer, TopKSoftmax
from lladax.sharding import MeshConfig, make_mesh, named_sharding, use_mesh

B, L, D, E, F = 8, 5, 6, 4, 3
CONFIG = MoEConfig(num_experts=E, num_experts_per_tok=2, expert_intermediate_size=F)
# By NumPy: whatever is compiled here, every process that collects the tests compiles.
RNG = np.random.default_rng(0)
X, GRAD = (jnp.asarray(RNG.standard_normal((B, L, D)), jnp.float32) for _ in range(2))
# Weights near 1 rather than 0.02, so that no gradient hides below the tolerance.
SHAPES = {"router": (D, E), "gate_up": (E, D, 2 * F), "down": (E, F, D)}
PARAMS = {n: jnp.asarray(RNG.normal(0, 0.7, shape), jnp.float32) for n, shape in SHAPES.items()}


@functools.partial(jax.jit, static_argnums=0)
def layer(config, params, x, grad, valid=None):
  """y, (gradients of the parameters and of x), stats."""

  def run(params, x):
    return MoELayer(config).apply({"params": params}, x, valid)

  y, vjp, stats = jax.vjp(run, params, x, has_aux=True)
  return y, vjp(grad), stats


def dense(config, params, x):
  """Every expert on every token, weighted by the softmax where it is among the k largest."""
  p = jax.nn.softmax(x @ params["router"], axis=-1)  # [B, L, E]
  kth = jnp.sort(p, axis=-1)[..., -config.num_experts_per_tok]
  weights = jnp.where(p >= kth[..., None], p, 0)
  if config.router.norm_topk_prob:
    weights = weights / weights.sum(-1, keepdims=True)
  gate, up = jnp.split(params["gate_up"], 2, axis=-1)
  gate, up = (jnp.einsum("bld,edf->blef", x, w) for w in (gate, up))
  return jnp.einsum("blef,efd,ble->bld", jax.nn.silu(gate) * up, params["down"], weights)


def assert_close(got, want, rtol=1e-5):
  def compare(a, b):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))

  jax.tree.map(compare, got, want)


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(num_experts_per_tok=E),
    dict(num_experts_per_tok=1),
    dict(router=TopKSoftmax(norm_topk_prob=True)),
  ],
  ids=str,
)
def test_equals_the_dense_transcription(changes):
  config = dataclasses.replace(CONFIG, **changes)
  y, gradients, stats = layer(config, PARAMS, X, GRAD)
  want, vjp = jax.vjp(functools.partial(dense, config), PARAMS, X)
  assert_close((y, gradients), (want, vjp(GRAD)))
  for gradient in jax.tree.leaves(gradients):
    assert np.abs(gradient).max() > 0.01
  if config.num_experts_per_tok == E:
    np.testing.assert_allclose(stats.load_share(), 1 / E, rtol=1e-6)


def test_nothing_is_dropped_when_all_go_one_way():
  x = X.at[..., 0].set(1.0)
  params = PARAMS | {"router": PARAMS["router"].at[0].add(40.0 * jnp.array([0, 1, 0, 1.01]))}
  y, gradients, stats = layer(CONFIG, params, x, GRAD)
  np.testing.assert_allclose(stats.load_share(), [0, 0.5, 0, 0.5], atol=1e-6)
  assert stats.dropped == 0
  want, vjp = jax.vjp(functools.partial(dense, CONFIG), params, x)
  assert_close((y, gradients), (want, vjp(GRAD)))
  assert (np.abs(y).max(-1) > 0).all()  # every token got something


def test_experts_have_no_order():
  permutation = np.array([2, 0, 3, 1])
  moved = {
    "router": PARAMS["router"][:, permutation],
    "gate_up": PARAMS["gate_up"][permutation],
    "down": PARAMS["down"][permutation],
  }
  y, (dparams, dx), stats = layer(CONFIG, PARAMS, X, GRAD)
  y2, (dparams2, dx2), stats2 = layer(CONFIG, moved, X, GRAD)
  assert_close((y2, dx2), (y, dx))
  assert_close(dparams2["down"], dparams["down"][permutation])
  assert_close(dparams2["router"], dparams["router"][:, permutation])
  assert_close(stats2.load[0], stats.load[0, permutation])


def test_stats_leave_padding_out_and_the_output_does_not_mind():
  valid = jnp.arange(L) < jnp.array([5, 3, 1, 0, 5, 2, 4, 5])[:, None]
  y, _, stats = layer(CONFIG, PARAMS, X, GRAD, valid)
  plain, _, _ = layer(CONFIG, PARAMS, X, GRAD)
  np.testing.assert_array_equal(y, plain)
  p = np.asarray(jax.nn.softmax(X[valid] @ PARAMS["router"], axis=-1))
  load = np.bincount(np.argsort(-p, axis=1)[:, :2].ravel(), minlength=E) / (2 * len(p))
  np.testing.assert_allclose(stats.load_share(), load, rtol=1e-6)
  np.testing.assert_allclose(stats.probability[0] / stats.tokens, p.mean(0), rtol=1e-5)


def test_bfloat16_activations_are_routed_in_float32():
  low, grad = X.astype(jnp.bfloat16), GRAD.astype(jnp.bfloat16)
  y, (dparams, dx), stats = layer(CONFIG, PARAMS, low, grad)
  assert y.dtype == dx.dtype == jnp.bfloat16 and dparams["gate_up"].dtype == jnp.float32
  logits = np.asarray(low, np.float64).reshape(-1, D) @ np.asarray(PARAMS["router"], np.float64)
  z = np.log(np.exp(logits).sum(1))
  np.testing.assert_allclose(stats.z_loss(), (z**2).mean(), rtol=1e-5)
  want = dense(CONFIG, PARAMS, low.astype(jnp.float32))
  assert np.abs(np.asarray(y, np.float32) - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize(
  "mesh_config, rows",
  [
    pytest.param(MeshConfig(), 8, id="data"),
    pytest.param(MeshConfig(data=2, fsdp=2, expert=2), 8, id="mixed"),
    pytest.param(MeshConfig(), 3, id="tokens_that_do_not_divide"),
  ],
)
def test_a_mesh_of_eight_equals_one_device(mesh_config, rows):
  valid = jnp.arange(L) < jnp.arange(3, 3 + rows)[:, None]
  args = PARAMS, X[:rows], GRAD[:rows], valid
  want = layer(CONFIG, *args)
  with use_mesh(make_mesh(mesh_config)) as mesh:
    split = named_sharding(mesh, "batch" if rows == 8 else None)
    axes = {
      "router": ("embed", "router"),
      "gate_up": ("experts", "embed", "expert_mlp"),
      "down": ("experts", "expert_mlp", "embed"),
    }
    placed = {
      name: jax.device_put(PARAMS[name], named_sharding(mesh, *axes[name])) for name in axes
    }
    got = layer(CONFIG, placed, *jax.device_put(args[1:], split))
    if rows == 8:
      assert len(got[0].sharding.device_set) == 8 and not got[0].sharding.is_fully_replicated
  assert_close(got, want)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(num_experts_per_tok=9), r"num_experts_per_tok.*num_experts=4, got 9"),
    (dict(num_experts_per_tok=0), r"num_experts_per_tok.*num_experts=4, got 0"),
    (dict(expert_intermediate_size=0), r"expert_intermediate_size.*got 0"),
    (dict(shared_expert_intermediate_size=-2), r"shared_expert_intermediate_size.*got -2"),
  ],
)
def test_config_errors_name_field_and_value(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)
