"""An imported model on disk in our own layout: made once, resumable, and opened on any mesh.

`import_to` works in `<target>.partial`, one layer of one parameter at a time, and notes what is
whole; killed and started again it goes on from there. The folder gets its name at the end. `params`
is an orbax checkpoint of zarr 3 arrays, with a checksum on every chunk, and restores without us:

  manifest.json    config, source, shapes
  params/<name>/   one array per parameter, and the metadata of orbax
  source/          config.json, tokenizer and generation settings of the folder
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from lladax import config as config_lib
from lladax.hub.load import HostParts, Loaded, plan_import, progress_bar, shardings_of, tree_of
from lladax.hub.mapping import Row
from lladax.hub.plan import Plan, Region, abstract, fill, named_leaves
from lladax.hub.reader import CONFIG_FILE, FolderError
from lladax.hub.source import SIDE_FILES, Source, source_of

MANIFEST = "manifest.json"
ORBAX_METADATA = "_METADATA"
FORMAT = 1
# Of an import that is under way: what it is of, and the steps that are whole.
BEGUN, DONE = "begun.json", "done"
# Chunks of the arrays: small enough that a device's part is read without much around it.
CHUNK_BYTES = 64 << 20


def import_to(
  path_or_id: str | os.PathLike,
  target: str | os.PathLike,
  *,
  dtype: str | None = None,
  ids: Mapping[str, int] | None = None,
  progress: bool = True,
) -> pathlib.Path:
  """Imports a Hugging Face folder or hub id; see `load_folder` for the arguments.

  Args:
    target: the folder to make. What an earlier call left in `<target>.partial` is kept.

  Raises:
    FolderError: if the source is damaged, the target exists, or what was begun is of another
      source or of other settings.
    ValueError: as `load_folder`.
  """
  target = pathlib.Path(target).expanduser()
  if target.exists():
    raise FolderError(f"{target} exists; choose another name, or remove it")
  plan = plan_import(path_or_id, dtype=dtype, ids=ids)
  partial = target.with_name(target.name + ".partial")
  done = _begin(partial, plan)
  with progress_bar(plan, progress) as read, open(partial / DONE, "a", encoding="utf-8") as log:
    for paths, rows in plan.groups():
      arrays = {path: _create(partial, path, plan.params[path]) for path in paths}
      for regions in _steps(paths, rows, plan):
        name = _step_name(regions)
        if name in done:
          continue
        buffers = {
          path: {region: np.empty([b - a for a, b in region], plan.params[path].dtype)}
          for path, region in regions.items()
        }
        fill(plan, rows, buffers, read)
        for path, region in regions.items():
          _write(arrays[path], region, buffers.pop(path)[region])
        log.write(name + "\n")
        log.flush()
        os.fsync(log.fileno())
  _finish(partial, plan)
  partial.rename(target)
  for name in (BEGUN, DONE):
    (target / name).unlink()
  return target


def is_store(path: str | os.PathLike) -> bool:
  """Whether `import_to` made this folder."""
  return (pathlib.Path(path).expanduser() / MANIFEST).is_file()


def open_store(
  target: str | os.PathLike,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str | None = None,
) -> Loaded:
  """Loads what `import_to` made, sharded over a mesh; each host reads its devices' parts.

  Args:
    target: the folder.
    mesh: None: the first device.
    dtype: of computation and parameters; None: as imported.

  Raises:
    FolderError: if there is no whole import there, or an array is damaged (every chunk has a
      checksum).
  """
  target = pathlib.Path(target).expanduser()
  config, source = _read_manifest(target)
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
  shardings = shardings_of(config, mesh)
  arrays = {}
  for path, leaf in named_leaves(abstract(config)).items():
    parts = HostParts(leaf, shardings[path])
    try:
      array = _open(target, path)
      if tuple(array.shape) != leaf.shape:
        raise ValueError(f"its shape is {list(array.shape)}, not {list(leaf.shape)}")
      for region, buffer in parts.buffers.items():
        _read_into(array, region, buffer)
    except ValueError as error:
      raise FolderError(
        f"{target}: parameter {path} is damaged ({' '.join(str(error).split())[:300]}); "
        "remove the folder and import again"
      ) from error
    arrays[path] = parts.to_devices()
  return Loaded(config=config, params=tree_of(config, arrays), source=source)


# --- Steps ---


def _steps(paths: Sequence[str], rows: Sequence[Row], plan: Plan) -> list[dict[str, Region]]:
  """What is written at once: each layer of stacked parameters, other parameters whole."""
  whole = {path: tuple((0, size) for size in plan.params[path].shape) for path in paths}
  if any(row.layers is None for row in rows):
    return [whole]
  layers = plan.params[paths[0]].shape[0]
  return [{path: ((i, i + 1), *whole[path][1:]) for path in paths} for i in range(layers)]


def _step_name(regions: Mapping[str, Region]) -> str:
  return ",".join(f"{path}[{region[0][0]}]" for path, region in sorted(regions.items()))


def _begin(partial: pathlib.Path, plan: Plan) -> set[str]:
  """Makes the folder, or checks that it is of this import; names of the steps that are whole."""
  folder = plan.folder
  identity = {
    "config": folder.config,
    "model": config_lib.to_tree(plan.config),
    "tensors": {t.name: [t.dtype, t.shape, t.file, t.start] for t in folder.tensors.values()},
  }
  fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
  begun = partial / BEGUN
  partial.mkdir(parents=True, exist_ok=True)
  if begun.exists() or {path.name for path in partial.iterdir()} - {BEGUN + ".tmp"}:
    try:
      found = json.loads(begun.read_text(encoding="utf-8"))
      same = found["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
      found, same = {}, False
    if not same:
      raise FolderError(
        f"{partial} was begun from {found.get('source', 'something else')} or with other settings; "
        "remove it, or choose another target"
      )
    log = partial / DONE
    # A line that was cut off does not count.
    return set(log.read_text(encoding="utf-8").split("\n")[:-1]) if log.exists() else set()
  content = json.dumps({"source": str(folder.path), "fingerprint": fingerprint})
  unfinished = begun.with_name(BEGUN + ".tmp")
  unfinished.write_text(content, encoding="utf-8")
  unfinished.rename(begun)
  return set()


def _finish(partial: pathlib.Path, plan: Plan):
  """The small files; the manifest last."""
  kept = partial / "source"
  kept.mkdir(exist_ok=True)
  for name in (CONFIG_FILE, *SIDE_FILES):
    if (plan.folder.path / name).is_file():
      shutil.copyfile(plan.folder.path / name, kept / name)
  manifest = {
    "format": FORMAT,
    "config": config_lib.to_tree(plan.config),
    "source": source_of(plan.folder, plan.family.name).to_tree(),
  }
  described = json.dumps(_orbax_metadata(plan))
  (partial / "params" / ORBAX_METADATA).write_text(described, encoding="utf-8")
  (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _orbax_metadata(plan: Plan) -> dict[str, Any]:
  """What orbax writes beside the arrays of a tree: the keys of each leaf, and how it is stored."""
  leaves = {}
  for path, leaf in plan.params.items():
    keys = path.split("/")
    leaves[str(tuple(keys))] = {
      "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: key of a dict
      "value_metadata": {
        # Restored as it lies, without devices to put it on unless they are given.
        "value_type": "np.ndarray",
        "skip_deserialize": False,
        "write_shape": list(leaf.shape),
      },
    }
  return {
    "tree_metadata": leaves,
    "use_ocdbt": False,
    "use_zarr3": True,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }


def _read_manifest(target: pathlib.Path) -> tuple[Any, Source]:
  path = target / MANIFEST
  if not path.is_file():
    partial = target.with_name(target.name + ".partial")
    begun = f"; {partial} was begun: run the same import again" if partial.exists() else ""
    raise FolderError(f"{target} is not an imported model, it has no {MANIFEST}{begun}")
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
      raise ValueError(f"format {manifest['format']!r}, this program reads {FORMAT}")
    config = config_lib.from_json(json.dumps(manifest["config"]))
    source = Source(**{**manifest["source"], "path": str(target / "source")})
  except (ValueError, KeyError, TypeError) as error:
    raise FolderError(f"{path} is not readable ({error}); import again") from error
  return config, source


# --- Arrays ---


def _spec(folder: pathlib.Path, path: str) -> dict[str, Any]:
  return {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": str((folder / "params" / path.replace("/", ".")).resolve())},
    # Without it, a chunk that is missing would be read as zeros.
    "fill_missing_data_reads": False,
  }  # fmt: skip


def _create(folder: pathlib.Path, path: str, leaf: jax.ShapeDtypeStruct) -> ts.TensorStore:
  metadata = {
    "shape": list(leaf.shape),
    "data_type": str(leaf.dtype),
    "chunk_grid": {
      "name": "regular",
      "configuration": {"chunk_shape": _chunk_shape(path, leaf.shape, leaf.dtype.itemsize)},
    },
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
  }
  spec = _spec(folder, path) | {"metadata": metadata}
  return ts.open(spec, create=True, open=True).result()


def _chunk_shape(path: str, shape: Sequence[int], itemsize: int) -> list[int]:
  """One layer, and of its first axis as much as `CHUNK_BYTES` holds."""
  axis = 1 if path.startswith(("layers/", "dense_layers/")) else 0
  slab = math.prod(shape[axis + 1 :]) * itemsize
  rows = max(1, min(shape[axis], CHUNK_BYTES // max(1, slab)))
  return [1] * axis + [rows, *shape[axis + 1 :]]


def _open(folder: pathlib.Path, path: str) -> ts.TensorStore:
  return ts.open(_spec(folder, path), open=True).result()


def _write(array: ts.TensorStore, region: Region, buffer: np.ndarray):
  """Chunk by chunk along the axis they are cut on, so that few copies are alive at once."""
  axis = next((i for i, rows in enumerate(array.chunk_layout.read_chunk.shape) if rows > 1), 0)
  step = array.chunk_layout.read_chunk.shape[axis]
  start, stop = region[axis]
  index = [slice(a, b) for a, b in region]
  for at in range(start, stop, step):
    here = slice(at, min(at + step, stop))
    part = (slice(None),) * axis + (slice(here.start - start, here.stop - start),)
    array[tuple([*index[:axis], here, *index[axis + 1 :]])].write(buffer[part]).result()


def _read_into(array: ts.TensorStore, region: Region, buffer: np.ndarray):
  (start, stop), rest = region[0], tuple(slice(a, b) for a, b in region[1:])
  step = array.chunk_layout.read_chunk.shape[0]
  for at in range(start, stop, step):
    end = min(at + step, stop)
    buffer[at - start : end - start] = array[(slice(at, end), *rest)].read().result()
