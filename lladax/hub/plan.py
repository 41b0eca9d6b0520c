"""What is to be read from a folder and where each tensor goes, settled before a weight is read.

A plan pairs every tensor with its place in a parameter. `fill` then reads the tensors of some
parameters, each once, into host buffers: whole parameters, the parts that this host's devices
hold, or single layers, as the caller asks.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from lladax.hub.families import Family, family_of
from lladax.hub.mapping import Row
from lladax.hub.reader import Folder, FolderError, some
from lladax.models import ModelConfig, abstract_params

# Start and stop along each axis of a parameter.
Region = tuple[tuple[int, int], ...]

# Larger tensors are read in parts where their row allows it, so that what is in flight between
# file and buffer stays small beside the buffer.
PART_BYTES = 4 << 20
LAYER_KEYS = ("num_hidden_layers", "n_layers")
# Tensors that are there, but that the config gives no place to: what they mean.
HINTS = (
  ("expert_bias", "config.json asks for no expert bias (moe_router_enable_expert_bias)"),
  ("shared_expert", "config.json asks for no shared expert"),
  ("_proj.bias", "config.json asks for no biases in the projections"),
  ("_norm.weight", "config.json asks for no such norm"),
  (".experts.", "config.json counts fewer experts or layers"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Everything about an import but the weights; made by `make_plan`.

  Attributes:
    folder: the tensors.
    family: of the config.
    config: of the model.
    rows: every tensor's place.
    params: shape and dtype of every parameter by path.
  """

  folder: Folder
  family: Family
  config: ModelConfig
  rows: tuple[Row, ...]
  params: Mapping[str, jax.ShapeDtypeStruct]

  def groups(self) -> list[tuple[tuple[str, ...], tuple[Row, ...]]]:
    """Parameters that must be filled together, with the rows that fill them."""
    groups: list[tuple[set[str], list[Row]]] = []
    for row in self.rows:
      paths, rows = set(row.params), [row]
      for group in [g for g in groups if g[0] & paths]:
        groups.remove(group)
        paths, rows = paths | group[0], group[1] + rows
      groups.append((paths, rows))
    return [(tuple(sorted(paths)), tuple(rows)) for paths, rows in groups]


def named_leaves(tree) -> dict[str, object]:
  """Leaves by path, e.g. "layers/moe/gate_up"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.cache
def abstract(config: ModelConfig):
  """`abstract_params`, traced once for a config."""
  return abstract_params(config)


def make_plan(folder: Folder, *, ids: Mapping[str, int], dtype: str) -> Plan:
  """Pairs tensors and parameters, and checks names and shapes on both sides.

  Args:
    folder: an opened one.
    ids: mask_token_id, eos_token_id, pad_token_id.
    dtype: of computation and parameters.

  Raises:
    FolderError: one error that names what is left over or of another shape.
    ValueError: for a config that no family has, or that asks for what is not computed here.
  """
  family = family_of(folder.config)
  _require_layers(folder)
  config = family.model_config(folder.config, ids=ids, dtype=dtype)
  try:
    params = named_leaves(abstract(config))
  except OverflowError as error:
    raise FolderError(f"{folder.path}: a size in config.json is absurd ({error})") from error
  rows = family.rows(config, folder.tensors.keys())
  _require_size(folder, rows)
  expected = tensor_shapes(rows, params)
  _require_all(folder, family, expected, _unfilled(rows, params))
  wrong = [
    f"{name}: {list(folder.tensors[name].shape)} in the file, {list(shape)} by config.json"
    for name, shape in expected.items()
    if folder.tensors[name].shape != shape
  ]
  if wrong:
    raise FolderError(
      f"{folder.path}: {len(wrong)} tensors have another shape than config.json says: {some(wrong)}"
    )
  return Plan(folder=folder, family=family, config=config, rows=tuple(rows), params=params)


def tensor_shapes(rows: Sequence[Row], params: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
  """Every tensor of the rows with its shape, in the order of the rows."""
  param_shapes = {path: tuple(leaf.shape) for path, leaf in params.items()}
  shapes: dict[str, tuple[int, ...]] = {}
  for row in rows:
    of_row = row.tensor_shapes(param_shapes)
    for _, _, names in row.names():
      for name, shape in zip(names, of_row, strict=True):
        if name in shapes:
          raise ValueError(f"two rows of the mapping use tensor {name!r}")
        shapes[name] = tuple(shape)
  return shapes


def _require_layers(folder: Folder):
  """Refuses an absurd number of layers before anything is listed by layer."""
  for key in LAYER_KEYS:
    if isinstance(count := folder.config.get(key), int) and count > len(folder.tensors):
      raise FolderError(
        f"{folder.path}: config.json says {key} {count}, but there are {len(folder.tensors)} tensors"
      )


def _require_size(folder: Folder, rows: Sequence[Row]):
  """Refuses a config with far more experts than the folder has, before they are listed."""
  count = sum(len(row.layers or (0,)) * (row.experts or 1) * len(row.tensors) for row in rows)
  if count > 100 * (len(folder.tensors) + 100):
    raise FolderError(
      f"{folder.path}: by its config.json the model has {count} tensors, but there are "
      f"{len(folder.tensors)}; its number of experts is wrong"
    )


def _unfilled(rows: Sequence[Row], params: Mapping[str, object]) -> list[str]:
  """Parameters that the rows do not fill, or not all slices of."""
  visits = dict.fromkeys(params, 0)
  size = dict.fromkeys(params, 1)
  for row in rows:
    count = sum(1 for _ in row.names())
    for path in row.params:
      visits[path] += count
      size[path] = int(np.prod(params[path].shape[: row.leading]))
  return [path for path in params if visits[path] != size[path]]


def _require_all(folder: Folder, family: Family, expected: Mapping, unfilled: list[str]):
  missing = [name for name in expected if name not in folder.tensors]
  unused = [name for name in folder.tensors if name not in expected]
  if not (missing or unused or unfilled):
    return
  hint = next((why for part, why in HINTS if any(part in name for name in unused)), None)
  raise FolderError(
    f"{folder.path} does not fit its config.json, read as {family.name}. "
    f"Tensors without a place: {some(unused)}{f' ({hint})' if hint else ''}. "
    f"Tensors that are missing: {some(missing)}. "
    f"Parameters that nothing fills: {some(unfilled)}"
  )


# --- Reading ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
  """One visit of a row, or some rows of its tensor.

  Attributes:
    row: the line of the table.
    names: of the tensors.
    lead: layer and expert, as far as the row has them.
    tensor_rows: of the tensor, where only some are read.
    axis: of the slice that these rows become.
  """

  row: Row
  names: tuple[str, ...]
  lead: tuple[int, ...]
  tensor_rows: slice | None = None
  axis: int = 0

  def region(self, shape: Sequence[int]) -> Region:
    """Where this goes within a parameter of the row, whose shape is given."""
    bounds = [(i, i + 1) for i in self.lead] + [(0, size) for size in shape[len(self.lead) :]]
    if self.tensor_rows is not None:
      bounds[len(self.lead) + self.axis] = (self.tensor_rows.start, self.tensor_rows.stop)
    return tuple(bounds)


def fill(
  plan: Plan,
  rows: Sequence[Row],
  buffers: Mapping[str, Mapping[Region, np.ndarray]],
  read: Callable[[int], object] = lambda count: None,
):
  """Reads the tensors that touch the buffers, each once, and writes them there.

  Args:
    plan: of the import.
    rows: that fill these parameters.
    buffers: path -> region of the parameter -> array of that region, to be written.
    read: called with the number of bytes of every tensor (or part of one) that was read.
  """
  shapes = {path: plan.params[path].shape for path in buffers}

  def touches(part: _Part) -> bool:
    return any(
      _overlap(part.region(shapes[path]), region) for path in part.row.params
      for region in buffers[path]
    )  # fmt: skip

  def copy(part: _Part):
    tensors = [plan.folder.read(name, part.tensor_rows) for name in part.names]
    if len({tensor.dtype for tensor in tensors}) > 1:
      tensors = [tensor.astype(plan.params[part.row.params[0]].dtype) for tensor in tensors]
    try:
      slices = part.row.to_params(tensors)
    except ValueError as error:
      raise FolderError(f"{plan.folder.path}, {', '.join(part.names)}: {error}") from error
    for path, value in zip(part.row.params, slices, strict=True):
      value = contiguous(value)[(None,) * len(part.lead)]
      for region, buffer in buffers[path].items():
        _copy_overlap(buffer, region, value, part.region(shapes[path]))
    read(sum(_nbytes(plan.folder, name, part) for name in part.names))

  parts = (part for row in rows for part in _parts(plan.folder, row) if touches(part))
  waiting = [_readers().submit(copy, part) for part in parts]
  try:
    for future in concurrent.futures.as_completed(waiting):
      future.result()
  finally:
    for future in waiting:
      future.cancel()
    concurrent.futures.wait(waiting)


@functools.cache
def _readers() -> concurrent.futures.ThreadPoolExecutor:
  """The same threads for every parameter: the C library keeps freed memory for each new one."""
  return concurrent.futures.ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))


def _nbytes(folder: Folder, name: str, part: _Part) -> int:
  tensor, rows = folder.tensors[name], part.tensor_rows
  return (
    tensor.nbytes if rows is None else tensor.nbytes * (rows.stop - rows.start) // tensor.shape[0]
  )


def _parts(folder: Folder, row: Row) -> Iterator[_Part]:
  axis = _part_axis(row)
  for layer, expert, names in row.names():
    lead = tuple(i for i in (layer, expert) if i is not None)
    tensor = folder.tensors[names[0]]
    if axis is None or tensor.nbytes <= PART_BYTES:
      yield _Part(row=row, names=names, lead=lead)
      continue
    length = tensor.shape[0]
    step = max(1, PART_BYTES * length // tensor.nbytes)
    for start in range(0, length, step):
      rows = slice(start, min(start + step, length))
      yield _Part(row=row, names=names, lead=lead, tensor_rows=rows, axis=axis)


def _part_axis(row: Row) -> int | None:
  """The axis of the slice that a tensor's first axis becomes; None where it is not one axis."""
  left, right = (side.split() for side in row.pattern.split("->"))
  if len(row.tensors) > 1 or len(row.params) > 1 or "(" in "".join(right):
    return None
  first = left[0]
  plain = first.isidentifier() and first in right and first not in dict(row.sizes)
  return right.index(first) if plain else None


def contiguous(array: np.ndarray) -> np.ndarray:
  """The array with its elements in order; XLA transposes some eight times faster than NumPy."""
  if array.flags.c_contiguous or array.dtype.itemsize > 4 or (cpu := _cpu()) is None:
    return array
  return np.asarray(jax.device_put(array, cpu))


@functools.cache
def _cpu() -> jax.Device | None:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
    return None


def _overlap(a: Region, b: Region) -> bool:
  return all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a, b, strict=True))


def _copy_overlap(buffer: np.ndarray, region: Region, value: np.ndarray, source: Region):
  """Copies the common part; `buffer` holds `region` of the parameter, `value` holds `source`."""
  if not _overlap(region, source):
    return
  common = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(region, source, strict=True)]
  into, out_of = (
    array[tuple(slice(lo - at, hi - at) for (lo, hi), (at, _) in zip(common, held, strict=True))]
    for array, held in ((buffer, region), (value, source))
  )
  if into.dtype == out_of.dtype and into.dtype.itemsize == 2:
    # As integers: NumPy copies its own types faster than bfloat16, and lets other threads run.
    into, out_of = into.view(np.uint16), out_of.view(np.uint16)
  into[...] = out_of
