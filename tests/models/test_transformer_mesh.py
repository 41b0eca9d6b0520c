"""A mesh of eight computes what one device computes, with the state sharded by logical names."""

import functools

import jax
import numpy as np
import pytest

from lladax.models import Transformer, init_params, init_variables, segments, tiny
from lladax.moe import MoEConfig
from lladax.sharding import (
  MeshConfig,
  batch_sharding,
  make_mesh,
  param_shardings,
  use_mesh,
)

B, L, V = 8, 6, 24
CONFIG = tiny(
  vocab_size=V,
  hidden_size=8,
  num_hidden_layers=2,
  num_attention_heads=2,
  moe=MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=6),
  initializer_range=0.3,
)


@jax.jit
def run(params, tokens, targets, weights, segment_ids):
  """((loss, (nll, stats)), gradients)."""
  model, mask = Transformer(CONFIG), segments(segment_ids)

  def loss(params):
    total, nll, stats = model.apply(
      {"params": params}, tokens, targets, weights, mask=mask, method="token_nll"
    )
    return total + stats.balance_loss().mean() + stats.z_loss().mean(), (nll, stats)

  return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def on_one_device():
  rng = np.random.default_rng(0)
  params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  tokens, targets = rng.integers(2, V, size=(2, B, L)).astype(np.int32)
  # The rows, and so the devices, have unequal shares of supervision and padding.
  weights = rng.random((B, L)) * (np.arange(L) < np.arange(B)[:, None])
  segment_ids = (np.arange(L) < np.arange(B, 0, -1)[:, None]).astype(np.int32)
  batch = tokens, targets, weights.astype(np.float32), segment_ids
  return params, batch, jax.device_get(run(params, *batch))


MESHES = [
  pytest.param(MeshConfig(), marks=pytest.mark.slow),
  pytest.param(MeshConfig(data=2, fsdp=2, expert=2), marks=pytest.mark.slow),
  pytest.param(MeshConfig(data=2, fsdp=2, context=2), marks=pytest.mark.slow),
  MeshConfig(fsdp=2, expert=2, tensor=2),
]


@pytest.mark.parametrize("mesh_config", MESHES, ids=str)
def test_loss_and_gradients_do_not_depend_on_the_mesh(mesh_config):
  params, batch, want = on_one_device()
  with use_mesh(make_mesh(mesh_config)) as mesh:
    boxed = jax.eval_shape(lambda: init_variables(CONFIG, jax.random.key(0))["params"])
    shardings = param_shardings(mesh, boxed)
    placed = jax.device_put(params, shardings)
    got = run(placed, *jax.device_put(batch, batch_sharding(mesh)))

  gate_up = placed["layers"]["moe"]["gate_up"]  # [n, E, D, 2F]
  shard = gate_up.sharding.shard_shape(gate_up.shape)
  split = mesh_config.fsdp * mesh_config.context
  assert shard == (2, 4 // mesh_config.tensor, 8 // split, 12 // mesh_config.expert)
  got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
  for (path, a), (_, b) in zip(got, want, strict=True):
    name = jax.tree_util.keystr(path)
    scale = np.abs(b).max() + 1e-6
    # Two layers deep, other shapes of products round otherwise: 1.7e-5 on jax 0.12.
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-5 * scale, err_msg=name)
