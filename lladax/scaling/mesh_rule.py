"""Which exchange and which mesh, by arithmetic on one layer's forward pass.

With weights gathered (`Fsdp`) the links carry the same bytes however many tokens a chip has; with
tokens exchanged they carry bytes per token. So many tokens per chip speak for `Fsdp`, few for
`Ring` on a short axis, and `Ragged`, which sends each token only where it must go, wins on long
ones. Per chip, N the size of the expert axis, s a token's hidden state, T tokens, W the experts of
a layer:

  Fsdp    W over all links
  Ring    W / N over the links of the other axes, 2 (N - 1) s T over those of the expert axis
  Ragged  W / N likewise,                         k N s T / 2   (each byte travels N / 4, there and
                                                                 back, k times); AllToAll the same
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from lladax.models import ModelConfig
from lladax.scaling.chips import Slice
from lladax.scaling.flops import token_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """An exchange on a mesh, and what one routed layer's forward pass takes on it.

  Attributes:
    fsdp, expert: sizes of the mesh axes; data and the others are 1.
    compute: seconds at peak.
    weights, tokens: seconds that the links carry weights, and tokens.
    excluded: why it cannot be used; empty if it can.
  """

  exchange: str
  fsdp: int
  expert: int
  compute: float
  weights: float
  tokens: float
  excluded: str = ""

  @property
  def links(self) -> float:
    return self.weights + self.tokens

  @property
  def seconds(self) -> float:
    return max(self.compute, self.links)

  @property
  def mesh(self) -> dict[str, int]:
    return {"data": 1, "fsdp": self.fsdp, "expert": self.expert}


def choices(model: ModelConfig, slice_: Slice, length: int, tokens_per_chip: float) -> list[Choice]:
  """All exchanges on all meshes that fit the torus, best first; those excluded last."""
  chip, found = slice_.chip, []
  flops = token_flops(model, length)
  layer = (flops.total - flops.head) / model.num_hidden_layers
  compute = tokens_per_chip * layer / chip.flops
  if model.moe is None:
    return [Choice(exchange="Fsdp", fsdp=f, expert=e, compute=compute, weights=0, tokens=0)
            for f, e in two_axes(slice_)]  # fmt: skip
  moe, D = model.moe, model.hidden_size
  weights = moe.num_experts * 3 * D * moe.expert_intermediate_size * 2
  state = 2 * D * tokens_per_chip
  for fsdp, expert in two_axes(slice_):
    everything = sum(chip.link * (2 if chip.wraps(dim) else 1) for dim in slice_.shape if dim > 1)
    everything = everything or chip.link
    axis = axis_bandwidth(slice_, expert)
    others = max(everything - axis, chip.link)
    shared = {"fsdp": fsdp, "expert": expert, "compute": compute}
    found.append(
      Choice(exchange="Fsdp", weights=weights / everything, tokens=0, **shared,
             excluded=_indivisible(model, fsdp, expert, gathered=True))
    )  # fmt: skip
    if expert == 1:
      continue
    part = weights / expert / others if fsdp > 1 else 0
    refused = _indivisible(model, fsdp, expert, gathered=False)
    ring = 2 * (expert - 1) * state / axis
    found.append(Choice(exchange="Ring", weights=part, tokens=ring, **shared, excluded=refused))
    sent = moe.num_experts_per_tok * expert * state / 2 / axis
    found.append(Choice(exchange="AllToAll", weights=part, tokens=sent, **shared, excluded=refused))
    if chip.name == "v5e" and slice_.chips >= 32:
      refused = "the compiler has no ragged_all_to_all on v5e slices of 32 chips and more"
    found.append(Choice(exchange="Ragged", weights=part, tokens=sent, **shared, excluded=refused))
  return sorted(found, key=_order)


def _order(choice: Choice):
  """Of equals the simpler exchange, then the more even mesh, whose axes are both short."""
  uneven = abs(math.log(choice.fsdp / choice.expert))
  exchange = ("Fsdp", "Ring", "Ragged", "AllToAll").index(choice.exchange)
  return bool(choice.excluded), choice.seconds, choice.links, exchange, uneven, choice.expert


def tokens_to_hide_gather(model: ModelConfig, slice_: Slice, length: int) -> float:
  """Tokens per chip from which a layer's compute takes longer than the gather of its experts."""
  gathered = choices(model, slice_, length, 1.0)
  fsdp = next(choice for choice in gathered if choice.exchange == "Fsdp")
  return fsdp.weights / fsdp.compute


def two_axes(slice_: Slice) -> list[tuple[int, int]]:
  """(fsdp, expert) with fsdp * expert = devices, each a product of whole torus dimensions."""
  dims = list(slice_.shape) + [slice_.chip.devices_per_chip]
  found = set()
  for chosen in itertools.product((False, True), repeat=len(dims)):
    expert = math.prod(dim for dim, take in zip(dims, chosen, strict=True) if take)
    found.add((slice_.devices // expert, expert))
  return sorted(found)


def axis_bandwidth(slice_: Slice, size: int) -> float:
  """Of a mesh axis of this size: the links of the fewest torus dimensions that make it."""
  chip, best = slice_.chip, None
  for count in range(1, len(slice_.shape) + 1):
    for dims in itertools.combinations(slice_.shape, count):
      if math.prod(dims) in (size, size // chip.devices_per_chip) and best is None:
        best = sum(chip.link * (2 if chip.wraps(dim) else 1) for dim in dims if dim > 1)
  return best or chip.link


def _indivisible(model: ModelConfig, fsdp: int, expert: int, *, gathered: bool) -> str:
  """Why the experts' weights do not divide among these devices, or nothing."""
  moe, D = model.moe, model.hidden_size
  if D % fsdp:
    return f"width {D} does not divide by fsdp={fsdp}"
  if gathered and moe.expert_intermediate_size % expert:
    return f"expert width {moe.expert_intermediate_size} does not divide by expert={expert}"
  if not gathered and moe.num_experts % expert:
    return f"{moe.num_experts} experts do not divide by expert={expert}"
  return ""
