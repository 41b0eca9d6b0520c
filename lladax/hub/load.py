"""A folder's weights straight into sharded arrays: no conversion step, no copy of the model.

One parameter at a time is put together on the host (only the parts of it that this host's devices
hold), handed to the devices and let go, so the host needs about the largest stacked parameter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from lladax.hub.families import family_of
from lladax.hub.ids import settle_ids
from lladax.hub.plan import Plan, Region, abstract, fill, make_plan, named_leaves
from lladax.hub.reader import Folder, open_folder
from lladax.hub.source import Source, find, source_of
from lladax.models import ModelConfig, init_variables
from lladax.sharding import param_shardings, use_mesh

# CPU arrays that begin at a multiple of this are used by XLA as they lie.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
  """A model from a folder.

  Attributes:
    config: the architecture.
    params: the parameters, a tree of arrays.
    source: where they are from; give it to `save_folder` to get the same folder again.
  """

  config: ModelConfig
  params: Any
  source: Source


def load_folder(
  path_or_id: str | os.PathLike,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str | None = None,
  ids: Mapping[str, int] | None = None,
  progress: bool = True,
) -> Loaded:
  """Loads a Hugging Face folder, or a hub id, into a model of ours.

  Args:
    path_or_id: a folder with config.json and safetensors, or "org/name".
    mesh: where the parameters go, each sharded as `lladax.sharding` says; None: the first device.
    dtype: of computation and parameters, "float32" or "bfloat16"; None: as the tensors are.
    ids: mask_token_id, eos_token_id, pad_token_id where the folder does not tell.
    progress: show a bar.

  Raises:
    FolderError: if the folder is damaged or does not hold what its config.json says.
    ValueError: for an unknown architecture, or a setting that is not computed here.
  """
  plan = plan_import(path_or_id, dtype=dtype, ids=ids)
  shardings = shardings_of(plan.config, mesh)
  done: dict[str, jax.Array] = {}
  with progress_bar(plan, progress) as read:
    for paths, rows in plan.groups():
      arrays = {path: HostParts(plan.params[path], shardings[path]) for path in paths}
      fill(plan, rows, {path: parts.buffers for path, parts in arrays.items()}, read)
      for path in paths:
        done[path] = arrays.pop(path).to_devices()
  source = source_of(plan.folder, plan.family.name)
  return Loaded(config=plan.config, params=tree_of(plan.config, done), source=source)


def plan_import(
  path_or_id: str | os.PathLike,
  *,
  dtype: str | None = None,
  ids: Mapping[str, int] | None = None,
) -> Plan:
  """Finds and opens the folder, settles dtype and special ids, and plans; see `load_folder`."""
  folder = open_folder(find(path_or_id))
  family = family_of(folder.config)
  settled = settle_ids(
    folder.path,
    folder.config,
    published=family.published_ids,
    asked=ids,
    needs_mask="mask_token_id" in family.published_ids,
  )
  return make_plan(folder, ids=settled, dtype=dtype or stored_dtype(folder))


def stored_dtype(folder: Folder) -> str:
  """ "bfloat16" where most of the weights are, else "float32", which holds float16 exactly."""
  sizes = {"BF16": 0}
  for tensor in folder.tensors.values():
    sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
  return "bfloat16" if 2 * sizes["BF16"] > sum(sizes.values()) else "float32"


def shardings_of(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
  """Sharding of every parameter by path.

  Raises:
    ValueError: if the model's heads or experts do not divide over the mesh.
  """
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return dict.fromkeys(named_leaves(abstract(config)), here)
  with use_mesh(mesh):
    variables = jax.eval_shape(functools.partial(init_variables, config), jax.random.key(0))
  return named_leaves(param_shardings(mesh, variables["params"]))


def tree_of(config: ModelConfig, arrays: Mapping[str, Any]):
  """The tree of parameters from arrays by path."""
  leaves = [arrays[path] for path in named_leaves(abstract(config))]
  return jax.tree.unflatten(jax.tree.structure(abstract(config)), leaves)


class HostParts:
  """Host buffers for the distinct parts of one parameter that this host's devices hold.

  Attributes:
    buffers: by region of the parameter, to be written before `to_devices`.
  """

  def __init__(self, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
    self.shape, self.sharding = leaf.shape, sharding
    self.devices: dict[Region, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
      region = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
      self.devices.setdefault(region, []).append(device)
    self.buffers = {
      region: aligned_empty([stop - start for start, stop in region], leaf.dtype)
      for region in self.devices
    }

  def to_devices(self) -> jax.Array:
    """The sharded array; each buffer is let go as soon as its devices have it."""
    arrays = []
    for region, devices in self.devices.items():
      buffer = self.buffers.pop(region)
      copies = [jax.device_put(buffer, device) for device in devices]
      arrays += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def aligned_empty(shape, dtype) -> np.ndarray:
  """Uninitialised memory that XLA on a CPU takes over instead of copying."""
  size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
  memory = np.empty(size + ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def progress_bar(plan: Plan, show: bool) -> Iterator[Callable[[int], object]]:
  """A bar over the bytes of the checkpoint; gives the function that advances it."""
  total = sum(tensor.nbytes for tensor in plan.folder.tensors.values())
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.DownloadColumn(),
    rich.progress.TransferSpeedColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(*columns, console=console, disable=not show) as bar:
    task = bar.add_task(plan.folder.path.name, total=total)
    yield lambda count: bar.advance(task, count)
