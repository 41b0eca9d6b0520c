"""Memory of a device by kind, and what would make a step fit that does not."""

from __future__ import annotations

import dataclasses
import math

import jax

from lladax.scaling.chips import GIB, Slice, larger_slices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes on a device.

  Attributes:
    parameters: of the model.
    optimizer: state of the optimizer, and counters.
    batch: the arguments that are no state.
    temporaries: activations, gradients, gathered weights, buffers of collectives.
    code: the program.
    peak: the most that is alive at any time, as the compiler reports it.
    needed: all that the program holds.
    available: what a program can have.
  """

  parameters: float
  optimizer: float
  batch: float
  temporaries: float
  code: float
  peak: float
  needed: float
  available: float

  @property
  def fits(self) -> bool:
    return self.needed <= self.available

  @property
  def state(self) -> float:
    return self.parameters + self.optimizer


@dataclasses.dataclass(frozen=True)
class Remedy:
  """A change, and what a device would need with it (an estimate, to be compiled)."""

  change: str
  needed: float


def shard_bytes(tree) -> int:
  """Bytes on one device of a tree of abstract arrays with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Situation:
  """What the remedies depend on.

  Attributes:
    memory: as compiled, or as the compiler refused it.
    fixed: bytes of temporaries that do not depend on the number of tokens: gradients and one
      layer's gathered weights.
    saved: bytes that the layers keep for the backward pass now, and `saved_least` with full
      recomputation.
    rows: of the batch that go through a device at a time.
  """

  memory: Memory
  slice_: Slice
  mesh_sizes: dict[str, int]
  fixed: float
  saved: float
  saved_least: float
  rows: float
  batch_size: int
  microbatches: int
  remat: str

  @property
  def moving(self) -> float:
    """Bytes of activations: in proportion to the tokens that are computed at a time."""
    return max(self.memory.temporaries - self.fixed, 0.0)

  def needed_in_parts(self, parts: int) -> float:
    """Bytes with so many times the microbatches, which keep a sum of gradients besides."""
    more = self.memory.parameters if self.microbatches == 1 else 0.0
    return self.memory.needed - self.moving + self.moving / parts + more


def remedies(at: Situation) -> list[Remedy]:
  """Changes that would make the step fit, or that help; the gentlest first."""
  memory, found = at.memory, []
  parts_of_rows = [parts for parts in (2, 4, 8, 16, 32) if at.rows % parts == 0]
  if at.remat not in ("full", "keep_nothing") and at.saved > at.saved_least:
    less = memory.needed - at.saved + at.saved_least
    found.append(Remedy("--set model.remat=full (recompute every layer)", max(less, 0)))
  for parts in parts_of_rows:
    change = f"--set microbatches={at.microbatches * parts} (fewer tokens at a time, same step)"
    found.append(Remedy(change, at.needed_in_parts(parts)))
    if found[-1].needed <= memory.available:
      break
  data = at.mesh_sizes.get("data", 1)
  if data > 1:
    needed = memory.needed - memory.state * (1 - 1 / data)
    sizes = at.mesh_sizes | {"data": 1, "fsdp": at.mesh_sizes.get("fsdp", 1) * data}
    text = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    found.append(Remedy(f"--mesh {text} (no copies of parameters and optimizer)", needed))
  for larger in larger_slices(at.slice_):
    ratio = at.slice_.devices / larger.devices
    needed = memory.needed - (memory.state + at.fixed / 2 + at.moving) * (1 - ratio)
    found.append(Remedy(f"--topology={larger.name} with the same batch", needed))
    if needed <= memory.available:
      break
  for parts in parts_of_rows:
    needed = memory.needed - at.moving + at.moving / parts
    size = at.batch_size // parts
    found.append(Remedy(f"--set data.batch_size={size} (a smaller step)", needed))
    if needed <= memory.available:
      break
  return found


def describe_remedies(at: Situation) -> list[str]:
  """Lines: by how much it does not fit, then what would make it fit."""
  memory = at.memory
  over = memory.needed - memory.available
  lines = [
    f"It does not fit: {memory.needed / GIB:.2f} GiB needed, {memory.available / GIB:.2f} GiB "
    f"there, {over / GIB:.2f} GiB too much. Estimated need with one change:"
  ]
  for remedy in remedies(at):
    verdict = "fits" if remedy.needed <= memory.available else "not enough alone"
    lines.append(f"  {remedy.needed / GIB:7.2f} GiB  {remedy.change}: {verdict}")
  return lines
