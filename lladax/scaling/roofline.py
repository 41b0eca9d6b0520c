"""How long a step takes at best: compute, HBM and links, each at its peak.

The step is between the slowest of the three, were all perfectly overlapped, and their sum, were
nothing overlapped. Neither bound knows that products of small tiles stay below the peak: a measured
step is slower than the first bound, and may be slower than the second.
"""

from __future__ import annotations

import dataclasses

from lladax.scaling.chips import Chip

DAY = 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds per step.

  Attributes:
    compute: compiled FLOPs at the peak of bfloat16.
    hbm: compiled HBM traffic at the published bandwidth.
    links: collectives, one after the other, at the links that their axes have.
    useful_flops: of all chips' share, per device.
    peak: of a device.
  """

  compute: float
  hbm: float
  links: float
  useful_flops: float
  peak: float

  @property
  def overlapped(self) -> float:
    return max(self.compute, self.hbm, self.links)

  @property
  def serial(self) -> float:
    return self.compute + self.hbm + self.links

  @property
  def bound_by(self) -> str:
    parts = {"compute": self.compute, "HBM": self.hbm, "links": self.links}
    return max(parts, key=parts.get)

  def mfu(self, seconds: float) -> float:
    return self.useful_flops / (seconds * self.peak)


def roofline(
  chip: Chip, *, flops: float, hbm_bytes: float, link_seconds: float, useful_flops: float
) -> Roofline:
  return Roofline(
    compute=flops / chip.flops,
    hbm=hbm_bytes / chip.hbm_bandwidth,
    links=link_seconds,
    useful_flops=useful_flops,
    peak=chip.flops,
  )


def days(tokens: float, tokens_per_step: float, seconds: float) -> float:
  return tokens / tokens_per_step * seconds / DAY
