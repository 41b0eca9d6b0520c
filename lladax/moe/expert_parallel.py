"""How tokens and experts meet on a mesh: four exchanges, within the layer's `shard_map`.

  Fsdp      experts' weights are gathered, tokens stay
  Ring      tokens are gathered, each device computes its own experts, the sums are scattered back
  Ragged    each row travels to the device of its expert and back, rows of any number
  AllToAll  the same in slots of a fixed number

All four compute the same, whatever the router does; `lladax.scaling` says which is fastest where.
With T tokens of width D per device and N devices on the expert axis, a layer's forward pass moves
through each device: Fsdp E * 3 * D * F * (N - 1) / N numbers, Ring 2 * (N - 1) * T * D, the others
2 * k * T * D * (N - 1) / N. Their buffers hold T * k rows in Fsdp and up to N * T * min(k, E / N) in
the others, since all tokens may want one device; `buffer_factor` bounds that.

Decoding has few tokens, so experts stay and tokens travel: `Ring`. Where the devices along the axis
have the same tokens (a batch that does not divide) it is a sum over them, 2 * (N - 1) / N * T * D
numbers for T tokens in all, as many as the ring moves for tokens of its own: there is nothing to
gain from another exchange.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from kernels_pallas.fused_moe import QuantizedExperts
from kernels_pallas.fused_moe.quantize import Weights
from kernels_pallas.permute import combine, dispatch
from lladax.moe.dispatch import make_plan
from lladax.moe.local import compute_own, compute_planned
from lladax.moe.route import AXIS, exchange_rows, first_expert, make_route
from lladax.sharding import axes_of, gather, mesh_in_use, total

OVERFLOW = ("gather", "drop")
NONE = np.int32(0)  # slots dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
  """How the experts' weights and the tokens of a layer lie on the mesh.

  Attributes:
    num_experts: E, of all devices.
    gate_up: of [E, D, 2F].
    down: of [E, F, D].
    rows: the axes of the mesh over which devices have other tokens.
  """

  num_experts: int
  gate_up: PartitionSpec
  down: PartitionSpec
  rows: frozenset[str]

  @property
  def split(self) -> tuple[str, ...]:
    """The axes over which the experts are split, major first."""
    return axes_of(self.gate_up[0])

  @property
  def everything(self) -> frozenset[str]:
    """The axes over which devices differ in tokens or experts."""
    return self.rows | frozenset(self.split)

  def whole_matrices(self, gate_up: Weights, down: Weights) -> tuple[Weights, Weights]:
    """A device's parts -> the whole matrices of its experts."""
    pairs = ((gate_up, self.gate_up), (down, self.down))
    matrices = (
      _gather(w, PartitionSpec(None, *lies[1:]), self.rows, whole=True) for w, lies in pairs
    )
    return tuple(matrices)


def specs_of(weights: Weights, lies: PartitionSpec):
  """How matrices [E, I, O] lie on the mesh: `lies`, and of `QuantizedExperts` the scales [E, O]."""
  if isinstance(weights, QuantizedExperts):
    return QuantizedExperts(values=lies, scales=PartitionSpec(lies[0], lies[2]))
  return lies


def _gather(weights: Weights, lies: PartitionSpec, over, *, whole: bool = False) -> Weights:
  """`sharding.gather` of matrices [E, I, O], in as many bits as they are stored in."""
  return jax.tree.map(
    lambda w, lies: gather(w, lies, over, whole=whole), weights, specs_of(weights, lies)
  )


class Exchange(abc.ABC):
  """A frozen dataclass: experts' weights and tokens, wherever they lie -> each token's sum."""

  @property
  @abc.abstractmethod
  def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Logical names of the axes of gate_up [E, D, 2F] and down [E, F, D]."""

  @property
  def may_drop(self) -> bool:
    """Whether slots can stay uncomputed, and are to be counted."""
    return False

  def check(self, experts: Experts):  # noqa: B027
    """Refuses a mesh that the experts do not fit; nothing by default.

    Raises:
      ValueError: saying which sizes fit.
    """

  @abc.abstractmethod
  def __call__(
    self, x, weights, experts, gate_up, down, place: Experts, *, implementation=None
  ) -> tuple[jax.Array, jax.Array]:
    """One device's part of the layer, within `sharding.on_devices`.

    Args:
      x: [T, D], the device's tokens.
      weights: float32[T, k].
      experts: int32[T, k].
      gate_up: the device's part of [E, D, 2F], an array or `QuantizedExperts`.
      down: the device's part of [E, F, D], likewise.
      place: how they lie.
      implementation: of `MoEConfig`.

    Returns:
      y [T, D] and int32[], the slots of all devices that no expert computed.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fsdp(Exchange):
  """Tokens stay where they are; the experts' weights are gathered for the layer, axis by axis.

  Exact on any mesh, no imbalance between devices, and the smallest buffers: T * k rows.
  """

  @property
  def axes(self):
    mlp = "gathered_expert_mlp"
    return ("gathered_experts", "embed", mlp), ("gathered_experts", mlp, "embed")

  def __call__(self, x, weights, experts, gate_up, down, place, *, implementation=None):
    gate_up, down = place.whole_matrices(gate_up, down)
    y = _own_experts(x, weights, experts, gate_up, down, place.split, implementation)
    return total(y, place.split), NONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InPlace(Exchange):
  """Experts stay on their devices along `AXIS`; tokens come to them.

  Attributes:
    buffer_factor: rows of a device's buffer, in multiples of what balanced routing needs. None:
      room for the worst case.
    on_overflow: what happens in a layer in which some buffer does not suffice. "gather": all
      devices gather the experts' weights for it, as `Fsdp` does: exact, only slower. "drop": what
      has no room is not computed, and counted in `RouterStats.dropped`.

  Raises:
    ValueError: for a factor that is not positive or an unknown `on_overflow`; on use, if the
      experts do not divide over the devices.
  """

  buffer_factor: float | None = None
  on_overflow: str = "gather"

  def __post_init__(self):
    if self.buffer_factor is not None and not self.buffer_factor > 0:
      raise ValueError(f"buffer_factor is positive or None; got {self.buffer_factor}")
    if self.on_overflow not in OVERFLOW:
      raise ValueError(f"on_overflow is one of {OVERFLOW}; got {self.on_overflow!r}")

  @property
  def axes(self):
    return ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")

  @property
  def may_drop(self):
    return self.buffer_factor is not None and self.on_overflow == "drop"

  def check(self, experts: Experts):
    mesh = mesh_in_use()
    sizes = {axis: mesh.shape[axis] for axis in ("tensor", AXIS)} if mesh else {}
    wanted = {axis: size for axis, size in sizes.items() if size > 1}
    if set(experts.split) != set(wanted):
      devices, E = math.prod(wanted.values()), experts.num_experts
      fitting = [n for n in range(1, E + 1) if E % n == 0]
      raise ValueError(
        f"{E} experts do not divide over {devices} devices ({wanted}), as {self!r} has it; the "
        f"product of these axes can be one of {fitting}, or use the exchange Fsdp()"
      )

  def __call__(self, x, weights, experts, gate_up, down, place, *, implementation=None):
    gate_up, down = place.whole_matrices(gate_up, down)
    split = AXIS in place.split and AXIS in place.rows
    route = self.route(experts, down.shape[0], place) if split else None

    def here(x, weights, gate_up, down):
      if route is None:  # all devices along the axis have these tokens, or there is no axis
        y = _own_experts(x, weights, experts, gate_up, down, place.split, implementation)
        return total(y, place.split), NONE
      y = self.exchange(x, weights, gate_up, down, route, implementation)
      dropped = total(route.dropped, place.everything) if self.may_drop else NONE
      return total(y, set(place.split) - {AXIS}), dropped

    def gathered(x, weights, gate_up, down):
      lies = PartitionSpec(AXIS, None, None)  # the minor axis of place.split
      gate_up, down = (_gather(w, lies, place.rows) for w in (gate_up, down))
      tensor = tuple(axis for axis in place.split if axis != AXIS)
      y = _own_experts(x, weights, experts, gate_up, down, tensor, implementation)
      return total(y, tensor), NONE

    args = x, weights, gate_up, down
    if route is None or self.buffer_factor is None or self.may_drop:
      return here(*args)
    overflow = total(route.dropped, place.everything) > 0
    return lax.cond(overflow, gathered, here, *args)

  @abc.abstractmethod
  def route(self, experts: jax.Array, num_experts: int, place: Experts):
    """What goes where, and `dropped`; `num_experts` are on each device."""

  @abc.abstractmethod
  def exchange(self, x, weights, gate_up, down, route, implementation) -> jax.Array:
    """y [T, D] of this device's tokens, of the experts along `AXIS` at its place on the others."""

  def room(self, worst: int, balanced: int) -> int:
    """Rows of a buffer: the worst case, or `buffer_factor` of the balanced one."""
    if self.buffer_factor is None:
      return worst
    return min(worst, max(1, math.ceil(self.buffer_factor * balanced)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(_InPlace):
  """Tokens of all devices along the axis are gathered; each computes its experts' share.

  A device's partial sums are taken in float32, and scattered back, added up, in the dtype of the
  activations.
  """

  def route(self, experts, num_experts, place):
    experts = _of_all(experts)
    tokens, k = experts.shape
    room = self.room(tokens * min(k, num_experts), tokens * k * num_experts // place.num_experts)
    first = first_expert(place.split, num_experts)
    return make_plan(experts, num_experts, first=first, room=room)

  def exchange(self, x, weights, gate_up, down, route, implementation):
    tokens = x.shape[0]
    x, weights = _of_all(x), _of_all(weights)
    devices = _devices(("tensor", AXIS))
    y = compute_planned(x, weights, gate_up, down, route, implementation, devices=devices)
    return lax.psum_scatter(y.reshape(-1, tokens, y.shape[1]), AXIS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllToAll(_InPlace):
  """Rows go to their experts' devices and back, in as many slots from each device to each other.

  `buffer_factor` counts in the slots of one pair of devices.
  """

  def route(self, experts, num_experts, place):
    tokens, k = experts.shape
    slots = self.room(tokens * min(k, num_experts), tokens * k * num_experts // place.num_experts)
    return make_route(experts, num_experts, place.split, slots=slots)

  def exchange(self, x, weights, gate_up, down, route, implementation):
    send = functools.partial(
      lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True
    )
    return _there_and_back(x, weights, gate_up, down, route, implementation, send, send)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged(_InPlace):
  """Rows go to their experts' devices and back, as many as there are (`lax.ragged_all_to_all`).

  TPU v5e slices of 32 chips and more do not have the collective; XLA:CPU neither, where it is
  emulated by gathering.
  """

  def route(self, experts, num_experts, place):
    tokens, k = experts.shape
    devices = lax.axis_size(AXIS)
    balanced = tokens * k * devices * num_experts // place.num_experts
    room = self.room(devices * tokens * min(k, num_experts), balanced)
    return make_route(experts, num_experts, place.split, room=room)

  def exchange(self, x, weights, gate_up, down, route, implementation):
    def there(rows):
      return exchange_rows(rows, route.counts, route.experts.shape[0], AXIS)

    def back(rows):
      return exchange_rows(rows, route.counts.T, route.plan.order.shape[0], AXIS)

    return _there_and_back(x, weights, gate_up, down, route, implementation, there, back)


def _of_all(x: jax.Array) -> jax.Array:
  """[T, ...] of every device along `AXIS` -> [N * T, ...].

  Gathered along an axis of its own, and scattered so on the way back: XLA for TPUs (libtpu 0.0.50)
  makes an all-reduce of twice the bytes of a scatter along the rows.
  """
  return lax.all_gather(x, AXIS).reshape(-1, *x.shape[1:])


def _there_and_back(x, weights, gate_up, down, route, implementation, there, back):
  """Rows to their experts, one weight each of 1, and the weighted sums at home."""
  send = route.plan
  rows = there(dispatch(x, send.order, send.inverse, weights.shape[1]))
  plan = make_plan(route.experts[:, None], down.shape[0])
  ones = jnp.ones((rows.shape[0], 1), jnp.float32)
  rows = back(compute_planned(rows, ones, gate_up, down, plan, implementation))
  return combine(rows, weights, send.order, send.inverse)


def _own_experts(x, weights, experts, gate_up, down, split, implementation):
  """The share of y of the experts at hand, with room for all of their slots."""
  experts = experts - first_expert(split, down.shape[0])
  options = {"devices": _devices(split)}
  return compute_own(x, weights, experts, gate_up, down, implementation, **options)


def _devices(axes) -> int:
  return math.prod(lax.axis_size(axis) for axis in axes)
