"""What the ops share: for which chip a kernel is made, which implementation runs, how it is tiled.

The platform of a computation is known only when it is lowered, and compiling ahead of time for a
chip that is not here is ordinary. So the choice of an implementation is made by `by_platform`, and
what is made for a chip asks `target_device_kind`, which `target` overrides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# Both belong to the keys of every jit cache, so that nothing traced for one chip serves another.
_TARGET = jax.make_user_context(None)
_INTERPRET = jax.make_user_context(False)


def manual_axes(x: jax.Array) -> frozenset[str]:
  """The mesh axes of the enclosing `shard_map` over which the devices' values of `x` may differ."""
  return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_like(x, *references):
  """A tree of arrays, taken to differ between devices wherever one of the references does.

  A loop's carry must be of one type from the start: zeros that rows of a batch are added to vary as
  the rows do. The derivative sums over the axes that were added. Outside `shard_map`, and where its
  types are not checked, this is the identity.
  """
  wanted = frozenset().union(*map(manual_axes, jax.tree.leaves(references)))

  def vary(leaf):
    axes = wanted - manual_axes(leaf)
    return lax.pcast(leaf, tuple(sorted(axes)), to="varying") if axes else leaf

  return jax.tree.map(vary, x)


def target(device_kind: str):
  """What is traced inside is meant for this kind of device, whatever the default device is.

  To be put around tracing and lowering ahead of time. The names are those of `device_kind` of a
  device: "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100 80GB HBM3", "cpu".

  Raises:
    ValueError: for a name that starts like none of them.
  """
  if not device_kind.startswith(("TPU", "NVIDIA", "cpu")):
    raise ValueError(
      f"unknown device kind {device_kind!r}; expected the device_kind of a device, such as "
      "'TPU v5', 'NVIDIA H100 80GB HBM3' or 'cpu'"
    )
  return _TARGET(device_kind)


def target_device_kind() -> str:
  """The kind of device that kernels are made for: that of `target`, else the default one's."""
  return _TARGET.value or jax.devices()[0].device_kind


def target_platform() -> str:
  """The platform of `target_device_kind`: "cpu", "tpu", "cuda", or another name of JAX's."""
  kind = _TARGET.value
  if kind is None:
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend
  return {"T": "tpu", "N": "cuda", "c": "cpu"}[kind[0]]


def for_target():
  """A context for calling a Pallas kernel: what its lowering asks of the device is the target's.

  Without it lowering asks the default device, on a machine that may not have the target's.
  """
  kind, mesh = _TARGET.value, jax.sharding.get_abstract_mesh()
  if kind is None or mesh.abstract_device is not None:
    return _TARGET(kind)  # nothing changes
  cores = chip().cores if kind.startswith("TPU") else 0
  device = jax.sharding.AbstractDevice(kind, cores, "tpu" if kind.startswith("TPU") else "gpu")
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh(
      mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device
    )
  )


def interpret():
  """Pallas kernels traced inside run step by step in XLA operations, on any platform: for tests."""
  return _INTERPRET(True)


def interpreted() -> bool:
  """Whether a kernel that is traced now is to be interpreted. Kernels take it as an argument."""
  return _INTERPRET.value


def by_platform(*args, cpu, tpu, cuda):
  """`cpu(*args)`, `tpu(*args)` or `cuda(*args)`, by the platform that is lowered for.

  `jax.lax.platform_dependent` traces every branch wherever it is called, and kernels take a
  hundred times as long to trace as loops. Here a branch is traced if it can be meant: that for CPUs
  (which may serve as hosts of any accelerator) and that of `target_platform`. Lowering for yet
  another platform is an error, never another implementation.

  For the bodies of derivatives: only `cpu` is certain to be traced, so it must not alone be
  differentiable.
  """
  platform = target_platform()
  if interpreted():
    platform = "cpu"
  branch = {"tpu": tpu, "cuda": cuda, "rocm": cuda}.get(platform)
  if branch is not None:
    return lax.platform_dependent(*args, cpu=cpu, **{platform: branch})
  return cpu(*_lowered_for(("cpu",), _NOT_TRACED, args))


_NOT_TRACED = (
  "this function was traced for a CPU only and is being lowered for {platform}: to compile ahead of "
  "time, trace it inside `with kernels_pallas.op.target(device_kind):`, for example 'TPU v5'"
)


def only_on(platform: str, name: str, function, *args):
  """`function(*args)`, for a kernel that runs on one platform and was asked for by name.

  Where kernels are interpreted it may run anywhere. Elsewhere lowering raises an error that says
  what would run.
  """
  if interpreted():
    return function(*args)
  message = (
    f"implementation {name!r} runs on {platform} only and is being lowered for {{platform}}; leave "
    "implementation=None to have one chosen, or trace inside `with kernels_pallas.op.interpret():`"
  )
  return function(*_lowered_for((platform,), message, args))


def _lowered_for(platforms, message, args):
  leaves, tree = jax.tree.flatten(args)
  return jax.tree.unflatten(tree, _guard.bind(*leaves, platforms=platforms, message=message))


_guard = Primitive("lowered_for")
_guard.multiple_results = True
_guard.def_abstract_eval(lambda *avals, **_: list(avals))


def _check(lowered_for, platforms, message):
  for platform in lowered_for:
    if platform not in platforms:
      raise ValueError(message.format(platform=platform))


@_guard.def_impl
def _guard_eagerly(*args, platforms, message):
  backend = jax.default_backend()
  _check(["cuda" if backend == "gpu" else backend], platforms, message)
  return list(args)


def _guard_lowering(context, *args, platforms, message):
  _check(context.platforms or context.module_context.platforms, platforms, message)
  return args


mlir.register_lowering(_guard, _guard_lowering)
ad.primitive_jvps[_guard] = lambda primals, tangents, **params: (
  _guard.bind(*primals, **params),
  list(tangents),
)
batching.primitive_batchers[_guard] = lambda args, axes, **params: (
  _guard.bind(*args, **params),
  axes,
)


def shape_like(shape: tuple[int, ...], dtype, *references) -> jax.ShapeDtypeStruct:
  """A kernel's output, differing between devices where a reference does (see `vary_like`)."""
  axes = frozenset().union(*map(manual_axes, references))
  if not axes:
    return jax.ShapeDtypeStruct(shape, dtype)
  varying = jax.sharding.ManualAxisType(varying=axes)
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What a TPU kernel's tiles must fit into.

  Attributes:
    vmem: bytes of vector memory that one kernel can use.
    cores: tensor cores that share a kernel's grid, splitting its first axis.
  """

  vmem: int
  cores: int


# Vector memory per core as `jax.experimental.pallas.tpu.get_tpu_info` gives it, by device kind.
_CHIPS = {
  "TPU v4": Chip(vmem=16 << 20, cores=2),
  "TPU v5 lite": Chip(vmem=128 << 20, cores=1),
  "TPU v5e": Chip(vmem=128 << 20, cores=1),
  "TPU v5": Chip(vmem=64 << 20, cores=2),
  "TPU v5p": Chip(vmem=64 << 20, cores=2),
  "TPU v6 lite": Chip(vmem=128 << 20, cores=1),
  "TPU v6e": Chip(vmem=128 << 20, cores=1),
  "TPU7x": Chip(vmem=64 << 20, cores=1),
}


def chip() -> Chip:
  """The target's `Chip`; for one that is not known the smallest of today's, which fits all."""
  return _CHIPS.get(target_device_kind(), Chip(vmem=64 << 20, cores=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """How a kernel cuts its work; which fields mean something is said by each kernel.

  Attributes:
    rows: rows (tokens, slots) of a tile.
    columns: columns of an output tile.
    depth: of the axis that is summed; in a weight gradient rows of an output tile. 0: whole.
    step: rows that are multiplied at once within a tile. 0: all.
    stages: copies in flight.
    warps: of a GPU's thread block.
  """

  rows: int
  columns: int
  depth: int = 0
  step: int = 0
  stages: int = 2
  warps: int = 4

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      low = 0 if field.name in ("depth", "step") else 1
      if not isinstance(value, int) or value < low:
        raise ValueError(f"Tiling.{field.name} must be an integer of at least {low}, got {value!r}")
    if self.step and self.rows % self.step:
      raise ValueError(f"step must divide rows, got {self.step} and {self.rows}")


def tuned(op: str, shape: tuple[int, ...], dtype) -> Tiling | None:
  """The tiling that `kernels_pallas.tune` found best for the target; None: it was not asked.

  Args:
    op: such as "grouped_matmul.pallas_tpu.forward".
    shape: the sizes that matter, the number of rows first. That one is taken to the next power of
      two: it changes with the batch, and the best tiles hardly with it.
    dtype: of the operands.
  """
  return table(target_device_kind()).get(table_key(op, shape, dtype))


def table_key(op: str, shape: tuple[int, ...], dtype) -> str:
  rows = 1 << (max(shape[0], 1) - 1).bit_length()
  return f"{op} {'x'.join(map(str, (rows, *shape[1:])))} {jnp.dtype(dtype).name}"


@functools.cache
def table(device_kind: str) -> dict[str, Tiling]:
  """All tuned tilings of a device kind: those that ship with the package, then the user's own.

  Every host of a multi-host run must read the same table, or they compile different programs.

  Raises:
    ValueError: for a file that holds something else.
  """
  found: dict[str, Tiling] = {}
  for path in (_shipped(device_kind), table_path(device_kind)):
    if path.exists():
      try:
        found |= {key: Tiling(**fields) for key, fields in json.loads(path.read_text()).items()}
      except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of tilings ({error}); delete it") from error
  return found


def table_path(device_kind: str) -> pathlib.Path:
  """Where `kernels_pallas.tune` keeps what it finds: below `$LLADAX_CACHE` or ~/.cache/lladax."""
  root = pathlib.Path(os.environ.get("LLADAX_CACHE") or "~/.cache/lladax").expanduser()
  return root / "tilings" / _shipped(device_kind).name


def _shipped(device_kind: str) -> pathlib.Path:
  name = "".join(c if c.isalnum() else "_" for c in device_kind.lower())
  return pathlib.Path(__file__).parent / "tilings" / f"{name}.json"


def save(device_kind: str, tilings: dict[str, Tiling]) -> pathlib.Path:
  """Adds to the user's table, replacing entries of the same key."""
  path = table_path(device_kind)
  known = json.loads(path.read_text()) if path.exists() else {}
  known |= {key: dataclasses.asdict(tiling) for key, tiling in tilings.items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f".{os.getpid()}")
  partial.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
  partial.replace(path)  # readers see the old table or the new one
  table.cache_clear()
  return path
