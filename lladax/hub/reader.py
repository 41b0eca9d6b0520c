"""A checkpoint folder: config.json, and tensors in safetensors shards that are read by name.

Opening reads the headers of the shards only and checks them against the sizes of the files, so
that a download that broke off is found before the first weight is read. The format: 8 bytes with
the length of a JSON header, little-endian; the header, which gives dtype, shape and a range of
bytes per tensor; the bytes, row by row, without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What a hub sends for a file that was committed without its content.
LFS_POINTER = b"version https://git-lfs"
# The format's own bound; a longer header is no header.
LONGEST_HEADER = 100_000_000

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


class FolderError(ValueError):
  """A folder that is no whole checkpoint, or that another program than this one can read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """Where one tensor lies.

  Attributes:
    name: as in the shard's header.
    dtype: the format's name of it: "BF16", "F32", "F16" or "F64".
    shape: of the tensor.
    file: name of the shard within the folder.
    start: offset of its first byte in the file.
  """

  name: str
  dtype: str
  shape: tuple[int, ...]
  file: str
  start: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
  """An opened folder; made by `open_folder`.

  Attributes:
    path: of the folder.
    config: content of config.json.
    tensors: by name, in the order of the shards and within them.
    metadata: what the shards' headers say besides; usually {"format": "pt"}.
  """

  path: pathlib.Path
  config: dict[str, Any]
  tensors: Mapping[str, Tensor]
  metadata: Mapping[str, str]

  def read(self, name: str, rows: slice | None = None) -> np.ndarray:
    """A tensor, or some of its rows, as stored.

    Args:
      name: of the tensor.
      rows: start and stop along the first axis; only their bytes are read.

    Raises:
      FolderError: if the file ends before the tensor does.
    """
    tensor = self.tensors[name]
    shape, start = tensor.shape, tensor.start
    if rows is not None:
      start += rows.start * math.prod(shape[1:]) * DTYPES[tensor.dtype].itemsize
      shape = (rows.stop - rows.start, *shape[1:])
    result = np.empty(shape, DTYPES[tensor.dtype])
    path = self.path / tensor.file
    with open(path, "rb", buffering=0) as file:
      file.seek(start)
      view = memoryview(result.reshape(-1).view(np.uint8))
      while len(view):
        if not (count := file.readinto(view)):
          raise FolderError(f"{path} ends within {name}: it changed since it was opened")
        view = view[count:]
    return result


def open_folder(path: str | os.PathLike) -> Folder:
  """Reads config.json, the index and the headers of the shards, and checks that all is there.

  Raises:
    FolderError: naming the file, what is wrong with it and what to do.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_dir():
    raise FolderError(f"{path} is not a folder with {CONFIG_FILE} and safetensors files")
  config = _read_object(path / CONFIG_FILE, "the model's config; download it beside the weights")
  files, index = _shards(path)
  tensors: dict[str, Tensor] = {}
  metadata: dict[str, str] = {}
  for file in files:
    found, more = _read_header(path / file)
    metadata |= more
    if twice := [name for name in found if name in tensors]:
      raise FolderError(
        f"{path}: tensor {twice[0]!r} is in {tensors[twice[0]].file} and in {file}; "
        "remove the shard that belongs to another checkpoint"
      )
    tensors |= found
  if index is not None:
    _require_indexed(path, index, tensors)
  return Folder(path=path, config=config, tensors=tensors, metadata=metadata)


def _shards(path: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
  """Names of the shards, and tensor -> shard where there is an index."""
  index_path = path / INDEX_FILE
  if index_path.exists():
    index = _read_object(index_path, "the list of the shards").get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
      raise FolderError(f"{index_path} has no 'weight_map' from tensor to file; download it again")
    files = sorted(set(index.values()))
    for file in files:
      if pathlib.PurePath(file).name != file or file in ("", ".", ".."):
        raise FolderError(f"{index_path} names {file!r}, which is not a file of this folder")
    if missing := [file for file in files if not (path / file).is_file()]:
      raise FolderError(
        f"{path}: of the {len(files)} shards in {INDEX_FILE}, {len(missing)} are missing: "
        f"{some(missing)}; download them"
      )
    return files, index
  found = sorted(file.name for file in path.glob("*.safetensors"))
  if SINGLE_FILE in found or len(found) == 1 and "-of-" not in found[0]:
    return [SINGLE_FILE if SINGLE_FILE in found else found[0]], None
  if found:
    raise FolderError(
      f"{path} has {len(found)} shards ({some(found)}) but no {INDEX_FILE}, which says what "
      "belongs to the checkpoint; download it"
    )
  others = sorted(
    file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)
  )
  pickled = f"; {some(others)} may run code when read and are not" if others else ""
  raise FolderError(f"{path} has no {SINGLE_FILE}; only safetensors are read{pickled}")


def _require_indexed(path: pathlib.Path, index: Mapping[str, str], tensors: Mapping[str, Tensor]):
  absent = [name for name, file in index.items() if _file_of(tensors, name) != file]
  extra = [name for name in tensors if name not in index]
  if absent or extra:
    raise FolderError(
      f"{path}: {INDEX_FILE} and the shards are of different checkpoints. "
      f"In the index but not in the shard it names: {some(absent)}. "
      f"In a shard but not in the index: {some(extra)}. Download the folder again"
    )


def _file_of(tensors: Mapping[str, Tensor], name: str) -> str | None:
  return tensors[name].file if name in tensors else None


def _read_header(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Tensors of one shard, in the order of their bytes, and its metadata."""
  size = path.stat().st_size
  with open(path, "rb") as file:
    prefix = file.read(8)
    if prefix + file.read(len(LFS_POINTER) - 8) == LFS_POINTER:
      raise FolderError(f"{path} is a pointer of git-lfs, not the weights; run `git lfs pull`")
    if len(prefix) < 8:
      raise FolderError(f"{path} has {size} bytes, too few for a header; download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > LONGEST_HEADER:
      raise FolderError(
        f"{path} announces a header of {length} bytes: it is not a safetensors file"
      )
    if 8 + length > size:
      raise FolderError(
        f"{path} is truncated: its header needs {8 + length} bytes, it has {size}; download it again"
      )
    file.seek(8)
    text = file.read(length)
  header = _parse_object(text, path, "its header")
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise FolderError(f"{path}: __metadata__ in its header does not map names to text")
  return _place(path, header, 8 + length, size), metadata


def _place(path: pathlib.Path, header: dict, base: int, size: int) -> dict[str, Tensor]:
  """Tensors from a header whose bytes begin at `base`; they must fill the file without gaps."""
  tensors, ranges = {}, {}
  for name, entry in header.items():
    try:
      dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
      well_formed = isinstance(dtype, str) and all(
        type(x) is int and x >= 0 for x in (*shape, start, stop)
      )
    except (TypeError, KeyError, ValueError):
      well_formed = False
    if not well_formed:
      raise FolderError(f"{path}: the header's entry of {name!r} is malformed: {str(entry)[:100]}")
    if dtype not in DTYPES:
      raise FolderError(
        f"{path}: {name!r} is of dtype {dtype!r}; read are {', '.join(DTYPES)}. "
        "Quantised checkpoints are not supported: use the unquantised one"
      )
    tensors[name] = Tensor(name=name, dtype=dtype, shape=shape, file=path.name, start=base + start)
    ranges[name] = (start, stop)
    if tensors[name].nbytes != stop - start:
      raise FolderError(
        f"{path}: {name!r} of {dtype} {list(shape)} takes {tensors[name].nbytes} bytes, but the "
        f"header gives it {stop - start}"
      )
  order = sorted(ranges, key=lambda name: ranges[name])
  end = 0
  for name in order:
    if ranges[name][0] != end:
      raise FolderError(f"{path}: {name!r} begins at byte {ranges[name][0]} of the data, not {end}")
    end = ranges[name][1]
  if base + end != size:
    what = "truncated" if base + end > size else "longer than its header says"
    raise FolderError(
      f"{path} is {what}: {base + end} bytes expected, it has {size}; download it again"
    )
  return {name: tensors[name] for name in order}


def _read_object(path: pathlib.Path, what: str) -> dict[str, Any]:
  try:
    text = path.read_bytes()
  except FileNotFoundError:
    raise FolderError(f"there is no {path}, {what}") from None
  return _parse_object(text, path, "it")


def _parse_object(text: bytes, path: pathlib.Path, what: str) -> dict[str, Any]:
  def unique(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
      names = [name for name, _ in pairs]
      twice = next(name for name in names if names.count(name) > 1)
      raise FolderError(f"{path}: {what} has {twice!r} twice")
    return result

  try:
    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise FolderError(f"{path}: {what} is not JSON ({error}); download it again") from None
  if not isinstance(value, dict):
    raise FolderError(f"{path}: {what} is not a JSON object but {str(value)[:50]!r}")
  return value


def some(names, most: int = 4) -> str:
  """A few of the names, and how many more there are."""
  names = list(names)
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more if names else "none"
