"""Every exchange on every mesh against the one-device layer and a dense transcription."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.moe import AllToAll, Fsdp, MoEConfig, MoELayer, Ragged, Ring
from lladax.sharding import MeshConfig, make_mesh, param_shardings, partition, use_mesh

B, L, D, E, F = 8, 4, 8, 8, 4
CONFIG = MoEConfig(num_experts=E, num_experts_per_tok=3, expert_intermediate_size=F)
EXCHANGES = (Fsdp(), Ring(), AllToAll(), Ragged())
MESHES = (
  MeshConfig(expert=8),
  MeshConfig(fsdp=2, expert=4),
  MeshConfig(data=2, expert=2, tensor=2),
  MeshConfig(fsdp=2, expert=2, context=2),
)
KEYS = jax.random.split(jax.random.key(0), 4)
X, GRAD = (jax.random.normal(key, (B, L, D)) for key in KEYS[:2])


def boxed(config=CONFIG):
  # Weights near 1 rather than 0.02, so that no gradient hides below the tolerance.
  return MoELayer(config, initializer_range=0.7).init(KEYS[2], X)["params"]


PARAMS = nn.meta.unbox(boxed())


def skewed(params, by):
  """The same layer with a router that likes some experts more."""
  return params | {
    "router": params["router"] + by * jnp.arange(E) * jnp.sign(X.mean((0, 1)))[:, None]
  }


@functools.partial(jax.jit, static_argnums=0)
def layer(config, params, x, grad):
  """y, (gradients of the parameters and of x), stats."""

  def run(params, x):
    y, stats = MoELayer(config).apply({"params": params}, x)
    # The losses of the router, too.
    return (y, stats.balance_loss + stats.z_loss), stats

  y, vjp, stats = jax.vjp(run, params, x, has_aux=True)
  return y, vjp((grad, jnp.ones(()))), stats


def dense(params, x, k):
  """Every expert on every token, weighted by the softmax where it is among the k largest."""
  p = jax.nn.softmax(x @ params["router"], axis=-1)  # [B, L, E]
  kth = jnp.sort(p, axis=-1)[..., -k]
  weights = jnp.where(p >= kth[..., None], p, 0)
  gate, up = jnp.split(params["gate_up"], 2, axis=-1)
  gate, up = (jnp.einsum("bld,edf->blef", x, w) for w in (gate, up))
  return jnp.einsum("blef,efd,ble->bld", jax.nn.silu(gate) * up, params["down"], weights)


def on_mesh(config, mesh_config, params=PARAMS, x=X, grad=GRAD):
  mesh = make_mesh(mesh_config)
  with use_mesh(mesh):
    placed = jax.device_put(
      params, param_shardings(mesh, jax.eval_shape(functools.partial(boxed, config)))
    )
    x, grad = (
      jax.device_put(
        a, jax.sharding.NamedSharding(mesh, partition(mesh, a.shape, ("batch", "length", None)))
      )
      for a in (x, grad)
    )
    return layer(config, placed, x, grad)


def assert_close(got, want, rtol=1e-5):
  def compare(a, b):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))

  jax.tree.map(compare, got, want)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda e: type(e).__name__)
def test_equals_one_device_and_the_dense_layer(exchange, mesh):
  config = dataclasses.replace(CONFIG, exchange=exchange)
  for by in (0.0, 3.0):  # the latter: nearly all tokens want the same three experts
    params = skewed(PARAMS, by)
    (y, _), grads, stats = on_mesh(config, mesh, params)
    want = layer(CONFIG, params, X, GRAD)
    assert_close(y, dense(params, X, CONFIG.num_experts_per_tok), 1e-6)
    assert_close(((y, _), grads, stats), want)
    assert stats.dropped == 0
