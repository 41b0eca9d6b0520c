"""What the TPU generations can do and which slices of them exist.

Peaks and HBM are Google's published figures per chip
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm), divided by the devices of a chip
where JAX sees several. HBM capacity is what the compiler leaves to a program, from its own message.
Link speeds are one way, below the published ones: about what has been measured (ppermute on v5p and
v6e reaches 86 GB/s per link).
"""

from __future__ import annotations

import dataclasses
import math

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device as JAX sees it: a chip, or one of the two of a TPU7x.

  Attributes:
    name: as in a topology, such as "v5p".
    flops: peak of bfloat16 matrix products, per second.
    hbm: bytes that a program can have.
    hbm_bandwidth: bytes per second.
    link: bytes per second of one link of the interconnect, one way.
    links: of a chip, two per dimension of the torus.
    devices_per_chip: that JAX sees.
    slices: that exist, besides those of whole cubes.
    largest: the largest slice of whole cubes of 4 x 4 x 4; None: there are no cubes.
    wraps_at: length from which a dimension is closed to a ring.
  """

  name: str
  flops: float
  hbm: float
  hbm_bandwidth: float
  link: float
  links: int
  devices_per_chip: int = 1
  slices: tuple[tuple[int, ...], ...]
  largest: tuple[int, ...] | None = None
  wraps_at: int

  @property
  def dims(self) -> int:
    return self.links // 2

  def wraps(self, length: int) -> bool:
    return length >= self.wraps_at and length % 4 == 0


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

CHIPS = {
  chip.name: chip
  for chip in (
    Chip(name="v5e", flops=197e12, hbm=15.75 * GIB, hbm_bandwidth=819e9, link=45e9, links=4,
         slices=FLAT, wraps_at=16),
    Chip(name="v5p", flops=459e12, hbm=95.73 * GIB, hbm_bandwidth=2765e9, link=90e9, links=6,
         slices=SMALL, largest=(16, 16, 24), wraps_at=4),
    Chip(name="v6e", flops=918e12, hbm=31.24 * GIB, hbm_bandwidth=1638e9, link=90e9, links=4,
         slices=FLAT, wraps_at=16),
    # Two devices per chip: each has half of the compute, of the HBM and of the links' speed.
    Chip(name="tpu7x", flops=2307e12 / 2, hbm=94.74 * GIB, hbm_bandwidth=7380e9 / 2, link=45e9,
         links=6, devices_per_chip=2, slices=SMALL, largest=(8, 16, 16), wraps_at=4),
  )
}  # fmt: skip


# What JAX calls the devices of a generation.
DEVICE_KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
}
# Dense bfloat16 products of tensor cores, from NVIDIA's data sheets of the SXM modules.
GPU_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12}


def peak_flops(device_kind: str) -> float | None:
  """Peak of bfloat16 matrix products per second of a device by `jax.Device.device_kind`."""
  if device_kind in DEVICE_KINDS:
    return CHIPS[DEVICE_KINDS[device_kind]].flops
  words = device_kind.replace("-", " ").split()
  return next((flops for name, flops in GPU_FLOPS.items() if name in words), None)


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of a pod: which chips, and how many along each dimension of their torus."""

  chip: Chip
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices_per_chip


def parse_slice(text: str) -> Slice:
  """The slice of a name such as "v5p:4x4x4".

  Raises:
    ValueError: for a generation or a shape that does not exist, with those that do.
  """
  generation, _, shape = text.partition(":")
  chip = CHIPS.get(generation)
  if chip is None:
    raise ValueError(
      f"there is no TPU generation {generation!r}; a topology is <generation>:<shape>, for example "
      f"v5p:4x4x4, with a generation of {', '.join(CHIPS)}"
    )
  sizes = shape.split("x")
  dims = tuple(int(size) for size in sizes) if all(size.isdecimal() for size in sizes) else ()
  if not exists(chip, dims):
    raise ValueError(f"there is no slice {text!r}; of {generation} there are {describe(chip)}")
  return Slice(chip, dims)


def exists(chip: Chip, dims: tuple[int, ...]) -> bool:
  if dims in chip.slices:
    return True
  cubes = len(dims) == 3 and all(dim >= 4 and dim % 4 == 0 for dim in dims)
  if not cubes or chip.largest is None or list(dims) != sorted(dims):
    return False
  return all(dim <= most for dim, most in zip(dims, chip.largest, strict=True))


def describe(chip: Chip) -> str:
  """The slices of a generation, in words."""
  names = ", ".join("x".join(map(str, dims)) for dims in chip.slices)
  if chip.largest is None:
    return names
  most = "x".join(map(str, chip.largest))
  return f"{names}, and multiples of 4x4x4 in ascending order up to {most}, such as 4x4x8 or 8x8x8"


def larger_slices(slice_: Slice, count: int = 2) -> list[Slice]:
  """The next larger slices of the same generation."""
  chip = slice_.chip
  shapes = list(chip.slices)
  if chip.largest is not None:
    a, b, c = (range(4, most + 1, 4) for most in chip.largest)
    shapes += [(x, y, z) for x in a for y in b if y >= x for z in c if z >= y]
  # Of several shapes of a size the one nearest to a cube.
  sizes = sorted({math.prod(s): s for s in sorted(shapes, key=max, reverse=True)}.items())
  powers = [shape for size, shape in sizes if size > slice_.chips and size & (size - 1) == 0]
  return [Slice(chip, shape) for shape in powers[:count]]
