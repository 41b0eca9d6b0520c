"""Where every tensor of a folder to be written goes: its shard and the offset of its bytes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import struct
from collections.abc import Mapping

from lladax.hub.reader import INDEX_FILE, SINGLE_FILE, Tensor

# The header is filled up with spaces, so that the numbers begin at a multiple of this.
HEADER_MULTIPLE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Shards of a folder.

  Attributes:
    files: names of the tensors in each shard, in the order of their bytes.
    tensors: their places; `start` counts from the first byte after the header.
  """

  files: Mapping[str, tuple[str, ...]]
  tensors: Mapping[str, Tensor]


def lay_out(
  shapes: Mapping[str, tuple[int, ...]],
  dtypes: Mapping[str, str],
  max_shard_size: int,
  *,
  files: Mapping[str, str] | None = None,
) -> Layout:
  """Assigns tensors to shards.

  Args:
    shapes: of every tensor.
    dtypes: of every tensor, by the format's names.
    max_shard_size: bytes of a shard; only a single tensor may be larger.
    files: shard of every tensor, in the order of their bytes, where that is given already; None:
      shards are filled up layer by layer.

  Raises:
    ValueError: if `max_shard_size` is below 1.
  """
  if max_shard_size < 1:
    raise ValueError(f"max_shard_size is a number of bytes, at least 1; got {max_shard_size}")
  order = sorted(shapes, key=_natural) if files is None else list(files)
  sizes = {
    name: Tensor(name=name, dtype=dtypes[name], shape=shapes[name], file="", start=0).nbytes
    for name in order
  }
  files = files or _fill_up(order, sizes, max_shard_size)
  contents: dict[str, list[str]] = {}
  tensors, ends = {}, {}
  for name in order:
    file = files[name]
    start = ends.get(file, 0)
    ends[file] = start + sizes[name]
    contents.setdefault(file, []).append(name)
    tensors[name] = Tensor(
      name=name, dtype=dtypes[name], shape=tuple(shapes[name]), file=file, start=start
    )
  return Layout(files={f: tuple(names) for f, names in contents.items()}, tensors=tensors)


def _fill_up(order: list[str], sizes: Mapping[str, int], most: int) -> dict[str, str]:
  shards: list[list[str]] = [[]]
  room = most
  for name in order:
    if shards[-1] and sizes[name] > room:
      shards.append([])
      room = most
    shards[-1].append(name)
    room -= sizes[name]
  if len(shards) == 1:
    return dict.fromkeys(order, SINGLE_FILE)
  count = len(shards)
  return {
    name: f"model-{i:05d}-of-{count:05d}.safetensors"
    for i, names in enumerate(shards, start=1)
    for name in names
  }


def _natural(name: str) -> list:
  """Layer 2 before layer 10."""
  return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def write_headers(folder: pathlib.Path, layout: Layout, metadata: Mapping[str, str]) -> Layout:
  """Makes every shard with its header and its full size, and the index where there are several.

  Returns:
    The layout with `start` counted from the beginning of the file.
  """
  tensors = {}
  for file, names in layout.files.items():
    entries = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
      tensor = layout.tensors[name]
      end = tensor.start + tensor.nbytes
      offsets = [tensor.start, end]
      entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % HEADER_MULTIPLE)
    with open(folder / file, "wb") as out:
      out.write(struct.pack("<Q", len(header)) + header)
      out.truncate(8 + len(header) + end)
    for name in names:
      tensor = layout.tensors[name]
      tensors[name] = dataclasses.replace(tensor, start=8 + len(header) + tensor.start)
  if list(layout.files) != [SINGLE_FILE]:
    total = sum(tensor.nbytes for tensor in layout.tensors.values())
    weight_map = {name: tensor.file for name, tensor in layout.tensors.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
  return Layout(files=layout.files, tensors=tensors)
