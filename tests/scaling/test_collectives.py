"""Collectives read off compiled programs: axes, bytes, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.scaling import hlo
from lladax.scaling.chips import parse_slice
from lladax.scaling.collectives import Layout, find_collectives, first_group
from lladax.scaling.loops import visits
from lladax.sharding import MeshConfig, make_mesh, named_sharding

V5P = parse_slice("v5p:2x2x2")
CORNERS = np.array([(x, y, z) for x in range(2) for y in range(2) for z in range(2)])
LAYOUT = Layout(("data", "fsdp", "expert"), (2, 2, 2), CORNERS)


@pytest.mark.quick
@pytest.mark.parametrize(
  "text, group",
  [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", [0, 2]),
    ("replica_groups={}, x=1", list(range(8))),
    ("channel_id=1, replica_groups=[2,4]<=[8], y", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), y", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, y", [0, 2]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, y", list(range(8))),
    ("replica_groups=mesh['a'=8] {'a':(1)2}, y", [0, 4]),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, y", [0, 4]),
    ("replica_groups=mesh['a'=8] {'a':(2)4}, y", [0, 1, 2, 3]),
  ],
)
def test_every_way_of_writing_groups(text, group):
  assert first_group(text, 8) == group


@pytest.mark.quick
def test_axes_and_links_of_a_group():
  assert LAYOUT.axes_of([0, 2]) == ("fsdp",)
  assert LAYOUT.axes_of([0, 1, 2, 3]) == ("fsdp", "expert")
  assert LAYOUT.bandwidth([0, 1], V5P) == 90e9  # an open line: one neighbour
  assert LAYOUT.bandwidth([0, 1, 2, 3], V5P) == 180e9
  ring = Layout(("a",), (4,), np.array([(0, 0, z) for z in range(4)]))
  assert ring.bandwidth([0, 1, 2, 3], parse_slice("v5p:4x4x4")) == 180e9  # both ways round
  assert ring.bandwidth([0, 1], parse_slice("v5p:4x4x4")) == 90e9  # a part of the ring is a line


def program(function, *specs):
  """Collectives of a `shard_map` over (data 2, fsdp 2, expert 2) on eight CPU devices."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
  P = type(named_sharding(mesh).spec)
  mapped = jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"),
                         check_vma=False)  # fmt: skip
  array = jax.ShapeDtypeStruct((32, 64), jnp.float32)
  module = hlo.parse(jax.jit(mapped).lower(array).compile().as_text())
  coords = np.array([(*place, 0, 0) for place in np.ndindex(2, 2, 2)])[:, :3]
  layout = Layout(mesh.axis_names, mesh.devices.shape, coords)
  return find_collectives(visits(module)[0], layout, V5P)


def test_bytes_that_a_device_receives():
  def gather(x):  # [16, 64] on a device
    whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # [32, 64]: 4096 bytes from one other
    return whole[:16] + whole[16:]

  (found,) = program(gather)
  assert (found.kind, found.axes, found.devices) == ("all-gather", ("fsdp",), 2)
  assert found.bytes == 16 * 64 * 4
  assert found.seconds == pytest.approx(16 * 64 * 4 / 90e9)


def test_a_reduction_costs_twice_and_loops_multiply():
  def loop(x):
    return jax.lax.fori_loop(0, 6, lambda _, x: jax.lax.psum(x, ("fsdp", "expert")) / 4, x)

  (found,) = program(loop)
  assert (found.kind, found.axes, found.times) == ("all-reduce", ("fsdp", "expert"), 6)
  assert found.bytes == 2 * 3 / 4 * 16 * 64 * 4
  assert found.total_bytes == 6 * found.bytes


def test_scatter_exchange_and_permutation():
  def step(x):
    y = jax.lax.psum_scatter(x, "expert", tiled=True)  # [8, 64]
    y = jax.lax.all_gather(y, "expert", tiled=True)
    y = jax.lax.all_to_all(y, "data", 0, 0, tiled=True)
    return jax.lax.ppermute(y, "fsdp", [(0, 1), (1, 0)])

  found = {c.kind: c for c in program(step)}
  # XLA for CPU writes a scatter as all-reduce and slice.
  scatter = found.get("reduce-scatter") or found["all-reduce"]
  assert scatter.axes == ("expert",)
  assert scatter.bytes == 16 * 64 * 4 / 2 * (1 if scatter.kind == "reduce-scatter" else 2)
  assert (found["all-to-all"].axes, found["all-to-all"].bytes) == (("data",), 16 * 64 * 4 / 2)
  permuted = found["collective-permute"]
  assert (permuted.axes, permuted.bytes) == (("fsdp",), 16 * 64 * 4)
