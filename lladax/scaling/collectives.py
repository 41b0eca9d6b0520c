"""The collectives of a compiled program: kind, mesh axes, bytes, and how long the links are busy."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from lladax.scaling.chips import Slice
from lladax.scaling.hlo import Computation, Instruction
from lladax.scaling.loops import Visit

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")  # fmt: skip
# Libtpu overlaps a collective with kernels by cutting it up among them. Each of them then holds the
# whole instruction; the first is told from the others by this flag, which is -1 there.
LATER_PART = re.compile(r'"flag_start":"\d+"')


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh on a slice: what a device number of the program stands for.

  Attributes:
    axes: names of the mesh axes.
    sizes: their sizes.
    coords: int[devices, dims], the place of each device in the torus, in the program's order.
  """

  axes: tuple[str, ...]
  sizes: tuple[int, ...]
  coords: np.ndarray

  @classmethod
  def of(cls, mesh) -> Layout:
    coords = np.array([getattr(device, "coords", (0,)) for device in mesh.devices.flat])
    return cls(tuple(mesh.axis_names), tuple(mesh.devices.shape), coords)

  def axes_of(self, group: Sequence[int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(np.asarray(group), self.sizes))
    return tuple(name for name, along in zip(self.axes, places, strict=True) if len(set(along)) > 1)

  def bandwidth(self, group: Sequence[int], slice_: Slice) -> float:
    """Bytes per second that reach a device of the group over all links along its dimensions.

    A dimension that the group spans whole, in a slice long enough to be closed to a ring, is fed
    from both sides. On an open line the devices at the ends have one neighbour.
    """
    places = self.coords[list(group)]
    total = 0.0
    for dim, length in enumerate(slice_.shape[: places.shape[1]]):
      spanned = len(set(places[:, dim]))
      if spanned > 1:
        ring = spanned == length and slice_.chip.wraps(length)
        total += slice_.chip.link * (2 if ring else 1)
    # Devices of one chip: as fast as all its links together, which is less than it can do.
    return total or slice_.chip.link * slice_.chip.links


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective of the program, as often as it runs.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes over which it goes.
    devices: in a group.
    bytes: that a chip receives each time: (N - 1) / N of the gathered, scattered or exchanged
      array, twice that for an all-reduce.
    times: per step.
    seconds: the links of a chip are busy each time.
    op_name: where in the model it comes from.
    size: bytes of the whole array, gathered or before the scatter.
  """

  kind: str
  axes: tuple[str, ...]
  devices: int
  bytes: float
  times: float
  seconds: float
  op_name: str
  size: float

  @property
  def total_bytes(self) -> float:
    return self.bytes * self.times

  @property
  def total_seconds(self) -> float:
    return self.seconds * self.times


def find_collectives(visits: list[Visit], layout: Layout, slice_: Slice) -> list[Collective]:
  """Every collective that moves something; one that is cut up among kernels counts once."""
  found = []
  for visit in visits:
    for instruction in visit.computation.instructions.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in KINDS and not LATER_PART.search(instruction.attributes):
        found.append(_collective(kind, visit, instruction, layout, slice_))
  return [collective for collective in found if collective and collective.bytes]


def _collective(kind, visit, instruction, layout, slice_) -> Collective | None:
  if kind == "collective-permute":
    pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.partition("metadata")[0])
    group = next(([int(a), int(b)] for a, b in pairs if a != b), None)
  else:
    group = first_group(instruction.attributes, len(layout.coords))
  if group is None or len(group) < 2:
    return None
  size = _whole_bytes(kind, visit.computation, instruction, len(group))
  received = size * {"all-reduce": 2}.get(kind, 1) * (len(group) - 1) / len(group)
  busy = received
  if kind.endswith("all-to-all"):
    busy = size * len(group) / 4  # every byte travels a quarter of the ring, on average
  elif kind == "collective-permute":
    received = busy = size
  return Collective(
    kind=kind,
    axes=layout.axes_of(group),
    devices=len(group),
    bytes=received,
    times=visit.times,
    seconds=busy / layout.bandwidth(group, slice_),
    op_name=instruction.op_name or _source(visit.computation, instruction),
    size=size,
  )


def _source(computation: Computation, instruction: Instruction) -> str:
  """The name of what a collective reads, for those that the compiler made and gave no name."""
  known = computation.instructions
  names = (known[name].op_name for name in instruction.operands if name in known)
  return next((name for name in names if name), "")


def _whole_bytes(kind: str, computation: Computation, instruction: Instruction, devices: int):
  """Bytes of the whole array on one chip: gathered, or before the scatter."""
  shapes = [shape for shape in instruction.shapes if shape.size > 1 or shape.dtype != "u32"]
  if instruction.opcode == "collective-permute-start":
    return shapes[-1].bytes
  if instruction.opcode == "all-gather-start":
    shapes = shapes[len(shapes) // 2 :]
  if kind == "ragged-all-to-all":
    # What is sent. The result is a buffer for the worst case.
    return computation.instructions[instruction.operands[0]].shape.bytes
  total = sum(shape.bytes for shape in shapes)
  return total * devices if kind == "reduce-scatter" else total


def first_group(attributes: str, devices: int) -> list[int] | None:
  """The first of the replica groups, in any of the three ways that XLA writes them."""
  text = attributes.partition("metadata=")[0].partition("replica_groups=")[2]
  if text.startswith("{{"):
    return [int(n) for n in re.match(r"\{\{([\d,\s]*)\}", text)[1].split(",") if n.strip()]
  if text.startswith("{}"):
    return list(range(devices))
  if text.startswith("["):
    groups, sizes, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(n) for n in groups.split(",")]
    return [int(n) for n in _iota(sizes, order).reshape(shape)[0]]
  if text.startswith("mesh["):
    return _mesh_group(text)
  return None


def _iota(sizes: str, order: str | None) -> np.ndarray:
  """`[4,2]T(1,0)`: device numbers, reshaped, transposed, flattened."""
  dims = [int(n) for n in sizes.split(",")]
  numbers = np.arange(np.prod(dims)).reshape(dims)
  if order:
    numbers = numbers.transpose([int(n) for n in order.split(",")])
  return numbers.reshape(-1)


def _mesh_group(text: str) -> list[int]:
  """`mesh['a'=2,'b'=4] {'b'}`, also with parts of an axis, `'b':(2)2`: major part 2, size 2."""
  header, _, rest = text.partition("]")
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", header)}
  ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", rest.partition("{")[0])
  numbers = np.arange(np.prod(list(sizes.values()))) if ids is None else _iota(ids[1], ids[2])
  axes = re.search(r"\{([^}]*)\}", rest)[1]
  numbers = numbers.reshape(list(sizes.values()))
  index: list = [0] * len(sizes)
  for name, major, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    place, size = list(sizes).index(name), sizes[name]
    if not part:
      index[place] = range(size)
    else:
      minor = size // (int(major) * int(part))
      index[place] = range(0, minor * int(part), minor)
  chosen = [np.atleast_1d(np.asarray(i)) for i in index]
  return [int(n) for n in numbers[np.ix_(*chosen)].reshape(-1)]
