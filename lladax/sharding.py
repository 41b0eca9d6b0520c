"""The mesh, and the one page that says which logical axis lies on which mesh axis.

Parameters are annotated beside their definition with logical names ("embed", "experts", ...);
activations are constrained by name with `constrain`. Nobody else writes a `PartitionSpec`, except
`lladax.moe.expert_parallel`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # a batch is split over all of them

# Logical axis -> mesh axes. A name that is not here is an error, not a silent replication.
LOGICAL_AXIS_RULES = (
  ("batch", BATCH_AXES),
  ("length", None),
  ("layers", None),
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("experts", "expert"),
  ("expert_mlp", "tensor"),
  ("router", None),
  ("norm", None),
  ("activation", None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes. -1 for at most one of them: whatever devices are left.

  Raises:
    ValueError: for a size below 1 other than -1, or more than one -1.
  """

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = self.sizes
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
      raise ValueError(f"mesh sizes are positive, at most one of them -1; got {self}")

  @property
  def sizes(self) -> tuple[int, ...]:
    return tuple(getattr(self, axis) for axis in MESH_AXES)


def make_mesh(config: MeshConfig | None = None, devices=None) -> Mesh:
  """A mesh over all devices (or those given) with axes `MESH_AXES`.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  config = config or MeshConfig()
  devices = list(jax.devices() if devices is None else devices)
  fixed = math.prod(size for size in config.sizes if size != -1)
  if len(devices) % fixed or (-1 not in config.sizes and fixed != len(devices)):
    raise ValueError(
      f"{config} needs {'a multiple of ' if -1 in config.sizes else ''}{fixed} devices; "
      f"there are {len(devices)}"
    )
  sizes = tuple(len(devices) // fixed if size == -1 else size for size in config.sizes)
  # Auto: the compiler places what is not constrained. make_mesh would default to Explicit.
  types = (AxisType.Auto,) * len(MESH_AXES)
  if len(devices) == len(jax.devices()):
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types)
  return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=types)


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
  """Within it, `constrain` and the logical names of parameters refer to this mesh."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
    yield mesh


def named_sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
  """The sharding of an array whose axes carry these logical names.

  Raises:
    KeyError: for a name that `LOGICAL_AXIS_RULES` does not list.
  """
  rules = dict(LOGICAL_AXIS_RULES)
  return NamedSharding(mesh, PartitionSpec(*(axis and rules[axis] for axis in logical_axes)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over every axis that carries data; the other axes of the array stay whole."""
  return named_sharding(mesh, "batch")


def param_shardings(mesh: Mesh, abstract_variables):
  """Shardings for a tree of Linen variables that carry logical axis names.

  `abstract_variables` is `jax.eval_shape` of an `init`, still boxed. Optimizer state that holds
  boxed copies of the parameters is handled too; a leaf without names is replicated.
  """
  specs = nn.get_partition_spec(abstract_variables)
  return nn.logical_to_mesh_sharding(specs, mesh, list(LOGICAL_AXIS_RULES))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
  """Pins an activation to the mesh by logical names; the identity outside `use_mesh`.

  An axis that its devices cannot share equally (a batch of one) is held by each of them.
  """
  if not nn.get_logical_axis_rules():
    return x
  mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())

  def divides(size: int, name: str | None) -> bool:
    axes = rules.get(name) or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return size % math.prod(mesh.shape.get(axis, 1) for axis in axes) == 0

  pairs = zip(x.shape, logical_axes, strict=True)
  names = tuple(name if divides(size, name) else None for size, name in pairs)
  return nn.with_logical_constraint(x, names)


def over_batch_shards(f, sharded: tuple[bool, ...]):
  """`f` on each device's rows: a `shard_map` over the batch axes of the mesh in use.

  Args:
    f: a function of arrays. Those marked in `sharded` are split along their first axis, the
      others arrive whole; every output is split along its first axis.
    sharded: one flag per argument.

  Returns:
    `f` itself where no mesh is in use, or where the rows do not divide among the devices.
  """

  def run(*args):
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = next(arg.shape[0] for arg, split in zip(args, sharded, strict=True) if split)
    if devices == 1 or rows % devices:
      return f(*args)
    split = PartitionSpec(BATCH_AXES)
    specs = tuple(split if s else PartitionSpec() for s in sharded)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(*args)

  return run
