"""Every exchange on every mesh against the one-device layer and a dense transcription."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.moe import AllToAll, Fsdp, MoEConfig, MoELayer, Ragged, Ring
from lladax.moe.route import exchange_rows
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
# Nearly all tokens want the same three experts. Not more, or the router's own rounding shows.
SKEW = 2.0
KEYS = jax.random.split(jax.random.key(0), 4)
X, GRAD = (jax.random.normal(key, (B, L, D)) for key in KEYS[:2])
X = X + 1


def boxed(config=CONFIG):
  # Weights near 1 rather than 0.02, so that no gradient hides below the tolerance.
  return MoELayer(config, initializer_range=0.7).init(KEYS[2], X)["params"]


PARAMS = nn.meta.unbox(boxed())


def skewed(params, by):
  """The same layer with a router that likes the last experts more, for tokens of mean 1."""
  return params | {"router": params["router"] + by * jnp.arange(E) / D}


@functools.partial(jax.jit, static_argnums=0)
def layer(config, params, x, grad):
  """y, (gradients of the parameters and of x), stats."""

  def run(params, x):
    y, stats = MoELayer(config).apply({"params": params}, x)
    # The losses of the router, too.
    return (y, stats.balance_loss() + stats.z_loss()), stats

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


# By default each exchange on another mesh; all of them on all are slow.
PAIRS = [
  pytest.param(exchange, mesh, marks=() if i == j else pytest.mark.slow)
  for i, exchange in enumerate(EXCHANGES)
  for j, mesh in enumerate(MESHES)
]


@pytest.mark.parametrize("exchange, mesh", PAIRS, ids=str)
def test_equals_one_device_and_the_dense_layer(exchange, mesh):
  config = dataclasses.replace(CONFIG, exchange=exchange)
  for by in (0.0, SKEW):
    params = skewed(PARAMS, by)
    (y, _), grads, stats = on_mesh(config, mesh, params)
    want = layer(CONFIG, params, X, GRAD)
    assert_close(y, dense(params, X, CONFIG.num_experts_per_tok), 1e-6)
    assert_close(((y, _), grads, stats), want)
    assert stats.dropped == 0


IN_PLACE = (Ring, AllToAll, Ragged)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", IN_PLACE)
def test_every_expert_of_every_token(exchange):
  config = dataclasses.replace(CONFIG, num_experts_per_tok=E, exchange=exchange())
  (y, _), grads, stats = on_mesh(config, MeshConfig(fsdp=2, expert=4))
  assert_close(y, dense(PARAMS, X, E), 1e-6)
  one_device = dataclasses.replace(config, exchange=Fsdp())
  assert_close(((y, _), grads, stats), layer(one_device, PARAMS, X, GRAD))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", IN_PLACE)
def test_a_buffer_that_overflows_is_exact_all_the_same(exchange):
  params = skewed(PARAMS, SKEW)
  want = layer(CONFIG, params, X, GRAD)
  for factor in (0.4, 1.25):
    config = dataclasses.replace(CONFIG, exchange=exchange(buffer_factor=factor))
    (y, _), grads, stats = on_mesh(config, MeshConfig(expert=4, fsdp=2), params)
    assert_close(((y, _), grads, stats), want)
    assert stats.dropped == 0


@pytest.mark.slow
@pytest.mark.parametrize("exchange", IN_PLACE)
def test_dropped_slots_are_counted_and_the_others_computed(exchange):
  params = skewed(PARAMS, SKEW)
  config = dataclasses.replace(
    CONFIG, exchange=exchange(buffer_factor=1.0, on_overflow="drop"), num_experts_per_tok=1
  )
  (y, _), grads, stats = on_mesh(config, MeshConfig(expert=4, fsdp=2), params)
  want = dense(params, X, 1)
  missing = np.abs(np.asarray(y)).max(-1) == 0  # with one expert a token is computed or not
  assert stats.dropped == missing.sum() > 0
  assert_close(np.asarray(y)[~missing], np.asarray(want)[~missing], 1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  # What is not computed gets no gradient but the router's losses'.
  sure = dataclasses.replace(config, exchange=exchange(buffer_factor=8.0, on_overflow="drop"))
  assert on_mesh(sure, MeshConfig(expert=4, fsdp=2), params)[2].dropped == 0


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda e: type(e).__name__)
def test_permuting_the_experts_permutes_nothing_else(exchange):
  config, mesh = dataclasses.replace(CONFIG, exchange=exchange), MeshConfig(expert=4, tensor=2)
  order = np.random.default_rng(0).permutation(E)
  permuted = {"router": PARAMS["router"][:, order]}
  permuted |= {name: PARAMS[name][order] for name in ("gate_up", "down")}
  (y, loss), (dparams, dx), stats = on_mesh(config, mesh)
  (y_, loss_), (dparams_, dx_), stats_ = on_mesh(config, mesh, permuted)
  assert_close((y_, loss_, dx_, stats_.entropy), (y, loss, dx, stats.entropy), 1e-6)
  assert_close(stats_.load[0], stats.load[0, order])
  assert_close(dparams_["router"], dparams["router"][:, order])
  for name in ("gate_up", "down"):
    assert_close(dparams_[name], dparams[name][order])


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda e: type(e).__name__)
def test_a_batch_of_one_is_computed_where_the_experts_lie(exchange):
  config = dataclasses.replace(CONFIG, exchange=exchange)
  x, grad = X[:1, :3], GRAD[:1, :3]
  got = on_mesh(config, MeshConfig(fsdp=2, expert=4), x=x, grad=grad)
  assert_close(got, layer(CONFIG, PARAMS, x, grad))


@pytest.mark.parametrize("exchange", IN_PLACE)
def test_experts_that_do_not_divide(exchange):
  config = dataclasses.replace(CONFIG, num_experts=6, exchange=exchange())
  with pytest.raises(ValueError, match=r"6 experts do not divide over 4 .*one of \[1, 2, 3, 6\]"):
    on_mesh(config, MeshConfig(fsdp=2, expert=4), nn.meta.unbox(boxed(config)))


def test_what_is_no_buffer():
  for wrong in (dict(buffer_factor=0.0), dict(buffer_factor=-1), dict(on_overflow="ignore")):
    with pytest.raises(ValueError, match="got"):
      Ring(**wrong)


@pytest.mark.parametrize("seed", range(3))
def test_rows_arrive_where_they_are_sent_and_their_gradients_come_back(seed):
  """`exchange_rows` against a loop over chunks, with empty chunks and room to spare."""
  devices, room, rows = 4, 40, 24
  rng = np.random.default_rng(seed)
  counts = rng.integers(0, 6, (devices, devices)) * (rng.random((devices, devices)) < 0.7)
  x = rng.normal(size=(devices, rows, 3)).astype(np.float32)
  want = np.zeros((devices, room, 3), np.float32)
  for to in range(devices):
    arrived = [x[i, counts[i, :to].sum() :][: counts[i, to]] for i in range(devices)]
    arrived = np.concatenate(arrived)
    want[to, : len(arrived)] = arrived

  mesh = make_mesh(MeshConfig(expert=devices), jax.devices()[:devices])
  split = jax.sharding.PartitionSpec("expert")

  def run(x):
    def local(x):
      counts_ = jnp.asarray(counts, jnp.int32)
      return exchange_rows(x[0], counts_, room, "expert")[None]

    return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)(x)

  with use_mesh(mesh):
    got, vjp = jax.vjp(jax.jit(run), x)
    np.testing.assert_array_equal(got, want)
    grad = rng.normal(size=want.shape).astype(np.float32)
    (back,) = vjp(grad)
  for i in range(devices):
    sent = counts[i].sum()
    assert not np.any(back[i, sent:])
  # <send x, g> = <x, send back g>, for any x: it is linear.
  np.testing.assert_allclose(np.vdot(want, grad), np.vdot(x, back), rtol=1e-4)
