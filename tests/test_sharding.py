"""The mesh: its sizes, what is split over it, and that nothing is silently replicated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lladax.models import init_variables, tiny
from lladax.sharding import (
  MESH_AXES,
  MeshConfig,
  batch_sharding,
  constrain,
  make_mesh,
  named_sharding,
  over_batch_shards,
  param_shardings,
  use_mesh,
)


@pytest.mark.parametrize(
  "config, sizes",
  [
    (MeshConfig(), (8, 1, 1, 1)),
    (MeshConfig(fsdp=2, expert=2), (2, 2, 2, 1)),
    (MeshConfig(data=1, tensor=-1), (1, 1, 1, 8)),
    (MeshConfig(data=2, fsdp=1, expert=4, tensor=1), (2, 1, 4, 1)),
  ],
)
def test_sizes_of_the_mesh(config, sizes):
  mesh = make_mesh(config)
  assert mesh.axis_names == MESH_AXES and tuple(mesh.shape.values()) == sizes
  assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_a_mesh_over_some_of_the_devices():
  mesh = make_mesh(MeshConfig(expert=2), devices=jax.devices()[:4])
  assert tuple(mesh.shape.values()) == (2, 1, 2, 1)


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
  assert specs["embed"]["embedding"] == PartitionSpec("tensor", "fsdp")
  assert specs["lm_head"]["kernel"] == PartitionSpec("fsdp", "tensor")
  layer = specs["layers"]
  assert layer["moe"]["gate_up"] == PartitionSpec(None, "expert", "fsdp", "tensor")
  assert layer["moe"]["down"] == PartitionSpec(None, "expert", "tensor", "fsdp")
  assert layer["attention"]["query"]["kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
  assert layer["attention"]["out"]["kernel"] == PartitionSpec(None, "tensor", None, "fsdp")
  split = {name for spec in jax.tree.leaves(specs) for name in spec if name}
  assert split == {"fsdp", "expert", "tensor"}


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


@pytest.mark.parametrize(
  "rows, seen", [(16, (2, 3)), (12, (12, 3))], ids=["divides", "does_not_divide"]
)
def test_each_device_computes_its_own_rows(rows, seen):
  shapes = []

  def scale(x, factor):
    shapes.append((x.shape, factor.shape))
    return x * factor

  x, factor = jnp.arange(3.0 * rows).reshape(rows, 3), jnp.array([1.0, 2, 3])
  run = over_batch_shards(scale, sharded=(True, False))
  with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, expert=2))):
    y = jax.jit(lambda x: run(x, factor))(x)
  assert shapes == [(seen, (3,))]
  np.testing.assert_array_equal(y, x * factor)
  shapes.clear()
  run(x, factor)  # no mesh: the function itself
  assert shapes == [((rows, 3), (3,))]


def test_constrain_leaves_whole_what_the_devices_cannot_share_equally():
  with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, expert=2))):
    run = jax.jit(lambda x: constrain(x, "batch", "mlp"))
    for rows in (1, 3, 8):
      y = run(jnp.ones((rows, 4)))
      parts = {shard.data.shape[0] for shard in y.addressable_shards}
      assert parts == ({1} if rows in (1, 8) else {3})
