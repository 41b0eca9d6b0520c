"""The mesh: its sizes, what is split over it, and that nothing is silently replicated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lladax import sharding
from lladax.models import init_variables, tiny
from lladax.scaling import aot
from lladax.scaling.chips import parse_slice
from lladax.sharding import (
  MESH_AXES,
  MeshConfig,
  axes_in,
  batch_sharding,
  constrain,
  fitting_sizes,
  gather,
  keep,
  make_mesh,
  named_sharding,
  on_devices,
  param_shardings,
  partition,
  spec,
  total,
  use_mesh,
)


@pytest.mark.parametrize(
  "config, sizes",
  [
    (MeshConfig(), (8, 1, 1, 1, 1)),
    (MeshConfig(fsdp=2, expert=2), (2, 2, 2, 1, 1)),
    (MeshConfig(data=1, tensor=-1), (1, 1, 1, 8, 1)),
    (MeshConfig(data=2, fsdp=1, expert=4, tensor=1), (2, 1, 4, 1, 1)),
  ],
)
def test_sizes_of_the_mesh(config, sizes):
  mesh = make_mesh(config)
  assert mesh.axis_names == MESH_AXES and tuple(mesh.shape.values()) == sizes
  assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_a_mesh_over_some_of_the_devices():
  mesh = make_mesh(MeshConfig(expert=2), devices=jax.devices()[:4])
  assert tuple(mesh.shape.values()) == (2, 1, 2, 1, 1)


@pytest.mark.parametrize("sizes", [dict(data=0), dict(fsdp=-2), dict(data=-1, expert=-1)])
def test_sizes_out_of_range(sizes):
  with pytest.raises(ValueError, match="positive, at most one of them -1; got MeshConfig"):
    MeshConfig(**sizes)


@pytest.mark.parametrize("sizes, needs", [(dict(fsdp=3), 3), (dict(data=2, fsdp=2), 4)])
def test_sizes_that_do_not_fit_the_devices(sizes, needs):
  with pytest.raises(ValueError, match=rf"needs .*{needs} devices; there are 8"):
    make_mesh(MeshConfig(**sizes))


def test_parameters_lie_where_their_logical_axes_say():
  config = tiny(vocab_size=32, hidden_size=16, head_dim=4)
  boxed = jax.eval_shape(lambda: init_variables(config, jax.random.key(0))["params"])
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(mesh, boxed))
  # Axis names of the mesh, layers first.
  assert specs["embed"]["embedding"] == PartitionSpec(None, ("fsdp", "expert"))
  assert specs["lm_head"]["kernel"] == PartitionSpec("fsdp", ("tensor", "expert"))
  layer = specs["layers"]
  assert layer["moe"]["gate_up"] == PartitionSpec(None, "tensor", "fsdp", "expert")
  assert layer["moe"]["down"] == PartitionSpec(None, "tensor", "expert", "fsdp")
  assert layer["attention"]["query"]["kernel"] == PartitionSpec(None, "fsdp", "tensor", "expert")
  assert layer["attention"]["out"]["kernel"] == PartitionSpec(None, "tensor", "expert", "fsdp")
  assert not any(specs["final_norm"]["scale"])


def test_what_does_not_divide_is_left_whole():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
  assert partition(mesh, (6, 4), ("embed", "vocab")) == PartitionSpec("fsdp", ("tensor", "expert"))
  assert partition(mesh, (6, 6), ("embed", "vocab")) == PartitionSpec("fsdp", "tensor")
  assert partition(mesh, (5, 3), ("embed", "vocab")) == PartitionSpec(None, None)
  assert partition(mesh, (2, 2), ("batch", None)) == PartitionSpec("fsdp", None)


def test_a_name_without_a_rule_is_an_error():
  with pytest.raises(KeyError, match="experst"):
    named_sharding(make_mesh(), "experst")


def test_constrain_is_the_identity_without_a_mesh_and_splits_the_batch_with_one():
  x = jnp.arange(16.0).reshape(8, 2)
  assert constrain(x, "batch", "activation") is x
  with use_mesh(make_mesh(MeshConfig(fsdp=2))) as mesh:
    y = jax.jit(lambda x: constrain(x, "batch", "activation"))(x)
    assert y.sharding.is_equivalent_to(batch_sharding(mesh), y.ndim)
    assert not y.sharding.is_fully_replicated
  np.testing.assert_array_equal(y, x)


def test_each_device_computes_its_own_rows():
  shapes = []

  def scale(x, factor):
    shapes.append((x.shape, factor.shape))
    return x * factor

  def run(x):
    rows = spec(x.shape, "batch", None)
    return on_devices(scale, (rows, spec(factor.shape, None)), rows, x, factor)

  x, factor = jnp.arange(48.0).reshape(16, 3), jnp.array([1.0, 2, 3])
  with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, expert=2))):
    y = jax.jit(run)(x)
  assert shapes == [((2, 3), (3,))]
  np.testing.assert_array_equal(y, x * factor)
  shapes.clear()
  run(x)  # no mesh: the function itself
  assert shapes == [((16, 3), (3,))]


@pytest.mark.parametrize("rows", [8, 4, 2, 1])  # fewer rows than devices: weights stay split
@pytest.mark.parametrize("names", [("embed", "vocab"), ("embed_columns", "heads")], ids=str)
def test_a_product_with_a_gathered_weight(rows, names):
  x, w = (
    jax.random.normal(jax.random.key(0), (rows, 8)),
    jax.random.normal(jax.random.key(1), (8, 8)),
  )

  def product(x, w):
    lies, batch = spec(w.shape, *names), spec(x.shape, "batch", None)
    split = axes_in(*batch)
    stays = keep(lies, split)

    def local(x, w):
      return total(x @ gather(w, lies, split), axes_in(stays[0]))

    specs = PartitionSpec(batch[0], stays[0]), lies
    return on_devices(local, specs, PartitionSpec(batch[0], stays[1]), x, w)

  def run(f):
    y, vjp = jax.vjp(f, x, w)
    return y, *vjp(jnp.sin(jnp.arange(y.size * 1.0)).reshape(y.shape))

  want = run(jnp.dot)
  for mesh in (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(fsdp=4, context=2)):
    with use_mesh(make_mesh(mesh)):
      for a, b in zip(jax.jit(lambda: run(product))(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_sizes_that_fit():
  sizes = fitting_sizes(jax.devices(), ("fsdp", "expert"))
  assert sizes == [(1, 1, 8, 1, 1), (1, 2, 4, 1, 1), (1, 4, 2, 1, 1), (1, 8, 1, 1, 1)]


def test_constrain_leaves_whole_what_the_devices_cannot_share_equally():
  with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, expert=2))):
    run = jax.jit(lambda x: constrain(x, "batch", "mlp"))
    for rows in (1, 3, 8):
      y = run(jnp.ones((rows, 4)))
      parts = {shard.data.shape[0] for shard in y.addressable_shards}
      assert parts == ({1} if rows in (1, 8) else {3})


def test_a_mesh_that_does_not_fit_the_torus():
  chips = aot.devices(parse_slice("v5p:4x4x4"))  # axes of the mesh are products of 4s
  assert make_mesh(MeshConfig(fsdp=16, expert=4), chips).shape["expert"] == 4
  with pytest.raises(ValueError, match="fsdp=8,expert=8 does not fit the torus") as error:
    make_mesh(MeshConfig(fsdp=8, expert=8), chips)
  assert "; fsdp=4,expert=16; fsdp=16,expert=4" in str(error.value)


@pytest.mark.parametrize(
  ("sizes", "own", "rows"),
  [
    ({"data": 4, "context": 2}, range(8), range(8)),  # one process holds all
    ({"data": 8}, [2, 3], [2, 3]),
    ({"data": 2, "fsdp": 4}, [1, 6], [1, 6]),  # devices that are not neighbours
    ({"data": 2, "context": 4}, [0, 1], [0, 1, 2, 3]),  # a part of the sequence of each row
    ({"data": 2, "context": 4}, [2, 3], [0, 1, 2, 3]),  # and another process the rest
  ],
)
def test_a_process_feeds_the_rows_of_its_devices(sizes, own, rows, monkeypatch):
  mesh = make_mesh(MeshConfig(**sizes))
  whole = sharding.batch_sharding(mesh)
  mine = {mesh.devices.flat[i] for i in own}

  class OfOneProcess:
    def addressable_devices_indices_map(self, shape):
      return {d: i for d, i in whole.devices_indices_map(shape).items() if d in mine}

  monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: OfOneProcess())
  assert sharding.own_rows(mesh, 8).tolist() == list(rows)
