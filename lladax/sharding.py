"""The mesh, the one page that says which logical axis lies on which mesh axis, and how ops use both.

Parameters are annotated beside their definition with logical names ("embed", "experts", ...). An op
with weights runs in a `shard_map` with every mesh axis manual (`on_devices`), where one rule holds:
a weight is gathered over the axes that share the rows of x, and stays split over the others. The
rows of training are split over all batch axes, so weights are gathered there, axis by axis; those of
a batch of one are not, and the same code multiplies by whatever part of a weight a device has.
Nobody else writes a `PartitionSpec`, except `lladax.moe.expert_parallel`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")  # a batch is split over all of them

# Logical axis -> mesh axes, major first. A name that is not here is an error, not a silent
# replication. A large weight lies on two of its dimensions over two axes, since a TPU gathers and
# scatters over one axis at a time: a collective over several becomes an all-reduce.
LOGICAL_AXIS_RULES = (
  # Activations.
  ("batch", BATCH_AXES),
  ("length", ("context",)),
  ("head_length", ("context", "tensor")),  # rows of the output head
  ("activation", ()),
  # Weights; tensor major, so that what is gathered of a dimension is contiguous.
  ("layers", ()),
  ("embed", ("fsdp", "context")),
  ("embed_columns", ("fsdp", "context", "expert")),  # of the table of embeddings
  ("vocab_rows", ()),
  ("vocab", ("tensor", "expert")),
  ("heads", ("tensor",)),
  ("kv_heads", ("tensor",)),
  ("head_dim", ("expert",)),
  ("mlp", ("tensor", "expert")),
  ("experts", ("tensor", "expert")),  # exchanges that leave experts where they are
  ("expert_mlp", ()),
  ("gathered_experts", ("tensor",)),  # the exchange that gathers them
  ("gathered_expert_mlp", ("expert",)),
  ("router", ()),
  ("norm", ()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes. -1 for at most one of them: whatever devices are left.

  Attributes:
    data: copies of the weights, each with its own rows of the batch.
    fsdp: weights are split over it and gathered for use; the batch too.
    expert: experts are split over it (`lladax.moe`), other weights as over fsdp; the batch too.
    tensor: heads, dense feed-forward width, experts of a token; activations are not split.
    context: the sequence is split over it, weights as over fsdp.

  Raises:
    ValueError: for a size below 1 other than -1, or more than one -1.
  """

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1

  def __post_init__(self):
    sizes = self.sizes
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
      raise ValueError(f"mesh sizes are positive, at most one of them -1; got {self}")

  @property
  def sizes(self) -> tuple[int, ...]:
    return tuple(getattr(self, axis) for axis in MESH_AXES)


def make_mesh(config: MeshConfig | None = None, devices=None) -> Mesh:
  """A mesh over all devices (or those given) with axes `MESH_AXES`.

  On a TPU each axis of the mesh is a product of whole axes of the torus, so that neighbours on the
  mesh are neighbours on the wires.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or do not fit the torus; the
      message lists sizes that do.
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
  grid = _on_torus(sizes, devices)
  if grid is None:
    used = [axis for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1]
    raise ValueError(
      f"{_named(sizes)} does not fit the torus of these {len(devices)} devices "
      f"({devices[0].device_kind}): every mesh axis must be a product of whole torus axes. These "
      "do: " + "; ".join(_named(fitting) for fitting in fitting_sizes(devices, used))
    )
  # Auto: the compiler places what is not constrained. jax.make_mesh would default to Explicit.
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _on_torus(sizes: tuple[int, ...], devices: list) -> np.ndarray | None:
  """The devices in the shape of the mesh, or None where the torus does not allow it."""
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(sizes)
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:
    return None


def fitting_sizes(devices: list, axes: Sequence[str] = BATCH_AXES) -> list[tuple[int, ...]]:
  """Sizes of all `MESH_AXES` that fit the devices, with only `axes` larger than 1.

  On a TPU those that are products of whole torus axes, elsewhere all factorisations.
  """

  def factorisations(n: int, parts: int):
    if parts == 1:
      yield (n,)
      return
    for first in range(1, n + 1):
      if n % first == 0:
        yield from ((first, *rest) for rest in factorisations(n // first, parts - 1))

  candidates = [
    tuple(dict(zip(axes, sizes, strict=True)).get(axis, 1) for axis in MESH_AXES)
    for sizes in factorisations(len(devices), len(axes))
  ]
  return [sizes for sizes in candidates if _on_torus(sizes, devices) is not None]


def _named(sizes: tuple[int, ...]) -> str:
  named = [f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1]
  return ",".join(named) or "one device"


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
  """Within it, ops with weights run on this mesh and `constrain` refers to it."""
  with jax.set_mesh(mesh):
    yield mesh


def partition(mesh, shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec:
  """Where an array lies whose axes carry these logical names.

  A mesh axis whose devices cannot share a dimension equally is left out, as are axes of size 1.

  Raises:
    KeyError: for a name that `LOGICAL_AXIS_RULES` does not list.
  """
  rules, used, dims = dict(LOGICAL_AXIS_RULES), set(), []
  for size, name in zip(shape, names, strict=True):
    here: list[str] = []
    for axis in rules[name] if name else ():
      devices = mesh.shape.get(axis, 1)
      if devices > 1 and axis not in used and size % devices == 0:
        here.append(axis)
        used.add(axis)
        size //= devices
    dims.append(here[0] if len(here) == 1 else tuple(here) or None)
  return PartitionSpec(*dims)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of one dimension of a `PartitionSpec`."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def named_sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
  """The sharding of an array whose axes carry these logical names, sizes unseen.

  Raises:
    KeyError: for a name that `LOGICAL_AXIS_RULES` does not list.
  """
  rules = dict(LOGICAL_AXIS_RULES)
  dims = (rules[axis] or None if axis else None for axis in logical_axes)
  return NamedSharding(mesh, PartitionSpec(*dims))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over every axis that carries data; the other axes of the array stay whole."""
  return named_sharding(mesh, "batch")


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """int64[R], increasing: the rows of a batch that the devices of this process hold.

  Processes that share a sequence (the context axis) hold the same rows.
  """
  parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def param_shardings(mesh: Mesh, abstract_variables):
  """Shardings for a tree of Linen variables that carry logical axis names.

  `abstract_variables` is `jax.eval_shape` of an `init`, still boxed. Optimizer state that holds
  boxed copies of the parameters is handled too; a leaf without names is replicated.
  """

  def sharding(leaf):
    if not isinstance(leaf, nn.meta.AxisMetadata):
      return NamedSharding(mesh, PartitionSpec())
    names = leaf.names + (None,) * (leaf.value.ndim - len(leaf.names))
    return NamedSharding(mesh, partition(mesh, leaf.value.shape, names))

  boxed = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
  return jax.tree.map(sharding, abstract_variables, is_leaf=boxed)


def mesh_in_use():
  """The mesh of `use_mesh`, or None outside it."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
  """Pins an activation to the mesh by logical names; the identity outside `use_mesh`.

  An axis that its devices cannot share equally (a batch of one) is held by each of them.
  """
  mesh = mesh_in_use()
  if mesh is None:
    return x
  return lax.with_sharding_constraint(
    x, NamedSharding(mesh, partition(mesh, x.shape, logical_axes))
  )


# --- Ops on the devices ---

_CHECKED = contextvars.ContextVar("checked", default=False)


@contextlib.contextmanager
def checked():
  """Within it, `on_devices` has JAX check over which axes each value varies.

  It finds a forgotten sum over devices, in tests; kernels of others may refuse it.
  """
  token = _CHECKED.set(True)
  try:
    yield
  finally:
    _CHECKED.reset(token)


def spec(shape: Sequence[int], *names: str | None) -> PartitionSpec:
  """`partition` on the mesh in use; nothing is split where there is none."""
  mesh = mesh_in_use()
  return PartitionSpec(*[None] * len(shape)) if mesh is None else partition(mesh, shape, names)


def joined(*dims) -> PartitionSpec:
  """A spec of dimensions taken from others; of none: the same on all devices."""
  return PartitionSpec(*dims)


def on_devices(f: Callable, in_specs: tuple, out_specs, *args):
  """f(*args), each device on its parts: a `shard_map` with every axis of the mesh manual.

  Where nothing is split, `f` itself: its collectives are over axes that occur in the specs.
  """
  mesh = mesh_in_use()
  if mesh is None or mesh.size == 1:
    return f(*args)
  return jax.shard_map(
    f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=_CHECKED.get()
  )(*args)


def axes_in(*entries) -> frozenset[str]:
  """All mesh axes of some dimensions of a `PartitionSpec`."""
  return frozenset(axis for entry in entries for axis in axes_of(entry))


def _divided(entry, over: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The axes of a dimension that stay and those that are gathered.

  What stays must be contiguous, so every axis minor to a gathered one is gathered with it.
  """
  axes = axes_of(entry)
  first = next((i for i, axis in enumerate(axes) if axis in over), len(axes))
  return axes[:first], axes[first:]


def keep(spec: PartitionSpec, over: Collection[str]) -> PartitionSpec:
  """What is left of a spec after `gather` over these axes."""
  dims = (_divided(entry, over)[0] for entry in spec)
  return PartitionSpec(*(dim[0] if len(dim) == 1 else dim or None for dim in dims))


def gather(
  w: jax.Array, spec: PartitionSpec, over: Collection[str], *, whole: bool = False
) -> jax.Array:
  """A device's part of a weight -> its part after gathering over these axes, one at a time.

  Within `on_devices`. The derivative scatters the sum over devices back, axis by axis, in the dtype
  of `w`.

  Args:
    w: the device's part.
    spec: how the weight lies on the mesh.
    over: the axes that the rows of x are split over. Where contiguity asks for others too, these
      devices all have the same rows: the result is taken to be equal on them.
    whole: gather over all other axes too.
  """
  for dim, entry in enumerate(spec):
    for axis in reversed(axes_of(entry) if whole else _divided(entry, over)[1]):  # minor first
      to = "varying" if axis in over else "invarying"
      w = lax.all_gather(w, axis, axis=dim, tiled=True, to=to)
  return w


def total(x, axes: Collection[str]):
  """The sum over the devices along these axes; the identity for none."""
  return lax.psum(x, tuple(sorted(axes))) if axes else x
