"""Which rows go from which device to which, where rows travel to their experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from kernels_pallas.op import vary_like
from lladax.moe.dispatch import Plan, make_plan

AXIS = "expert"


@struct.dataclass
class Route:
  """One device's view of an exchange among the N devices along `AXIS`.

  Attributes:
    plan: its slots in the order in which they are sent, chunk after chunk by destination.
    counts: int32[N, N], rows from each device (first axis) to each other.
    experts: int32[R], the expert of each row that arrives, counted among the device's own; their
      number where no row arrives.
  """

  plan: Plan
  counts: jax.Array
  experts: jax.Array

  @property
  def dropped(self) -> jax.Array:
    """int32[], slots of this device that nobody has room for."""
    return self.plan.dropped


def first_expert(split: tuple[str, ...], num_experts: int) -> jax.Array | int:
  """The first expert of this device, where each has `num_experts` and `split` is major first."""
  return lax.axis_index(split) * num_experts if split else 0


def make_route(
  experts: jax.Array,
  num_experts: int,
  split: tuple[str, ...],
  *,
  slots: int | None = None,
  room: int | None = None,
) -> Route:
  """The exchange of a routing decision, known to all devices from all their counts.

  Args:
    experts: int32[T, k], this device's.
    num_experts: on each device.
    split: the axes of the mesh that experts are split over, `AXIS` the last. Devices at other
      places on the others have the same tokens, and each sends what its own group computes.
    slots: rows that a device sends to each other one, used or not.
    room: rows that a device can receive, where as many are sent as there are.
  """
  devices, me = lax.axis_size(AXIS), lax.axis_index(AXIS)
  of_group = devices * num_experts
  first = first_expert(split[:-1], of_group)
  sort = make_plan(experts, of_group, first=first)
  sizes = lax.all_gather(sort.group_sizes.reshape(devices, num_experts), AXIS)
  wanted = sizes.sum(-1)  # [from, to]; sizes [from, to, expert]
  if slots is None:
    counts = _differences(jnp.minimum(jnp.cumsum(wanted, 0), room), axis=0)
  else:
    counts = jnp.minimum(wanted, slots)
  sizes = _differences(jnp.minimum(jnp.cumsum(sizes, -1), counts[..., None]), axis=-1)

  starts = _starts(counts[me]) if slots is None else slots * jnp.arange(devices)
  rows = sort.order.shape[0] if slots is None else devices * slots
  return Route(
    plan=_packed(sort, (experts.reshape(-1) - first) // num_experts, wanted[me], counts[me],
                 starts, rows),
    counts=counts,
    experts=_arriving(sizes[:, me], slots, room),
  )  # fmt: skip


def _packed(sort: Plan, to, wanted, counts, starts, rows: int) -> Plan:
  """The slots sorted by expert, moved to where the chunk of their destination starts.

  to: int32[T * k], each slot's destination; sent are `counts` of the `wanted` rows of each.
  """
  slots, before = to.shape[0], _starts(wanted)
  place = jnp.arange(rows)
  chunk = jnp.searchsorted(starts, place, side="right") - 1
  within = place - starts[chunk]
  order = sort.order.at[before[chunk] + within].get(mode="fill", fill_value=slots)
  to = jnp.clip(to, 0, counts.shape[0] - 1)  # slots of other groups are absent anyway
  position = sort.inverse - before[to]
  sent = (sort.inverse < sort.order.shape[0]) & (position < counts[to])
  return Plan(
    order=jnp.where(within < counts[chunk], order, slots),
    inverse=jnp.where(sent, starts[to] + position, rows),
    group_sizes=counts,
    dropped=(wanted - counts).sum(),
  )


def _arriving(sizes: jax.Array, slots: int | None, room: int | None) -> jax.Array:
  """The expert of each arriving row; sizes int32[N, experts], rows by source, then by expert."""
  num_experts = sizes.shape[1]
  if slots is None:
    ends = jnp.cumsum(sizes.reshape(-1))
    group = jnp.searchsorted(ends, jnp.arange(room), side="right")
    return jnp.where(group < ends.size, group % num_experts, num_experts).astype(jnp.int32)
  ends = jnp.cumsum(sizes, 1)[:, None]  # [N, 1, experts]
  return (jnp.arange(slots)[:, None] >= ends).sum(-1, dtype=jnp.int32).reshape(-1)


def _starts(counts: jax.Array) -> jax.Array:
  return jnp.cumsum(counts) - counts


def _differences(ends: jax.Array, axis: int) -> jax.Array:
  return jnp.diff(ends, axis=axis, prepend=jnp.zeros_like(lax.slice_in_dim(ends, 0, 1, axis=axis)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange_rows(rows: jax.Array, counts: jax.Array, room: int, axis: str) -> jax.Array:
  """Sends chunks of rows to the devices along an axis; the derivative sends them back.

  Args:
    rows: [S, D], the chunk for each device after the one for the device before.
    counts: int32[N, N], rows from each device to each other, the same on all of them.
    room: R, at least what any device receives.
    axis: of the mesh.

  Returns:
    [R, D], the chunk of each device after that of the one before, then zeros.
  """
  me = lax.axis_index(axis)
  before_to = jnp.cumsum(counts, 1) - counts  # where in its rows a device's chunks begin
  before_from = jnp.cumsum(counts, 0) - counts  # where at their destinations they will
  out = vary_like(jnp.zeros((room, rows.shape[1]), rows.dtype), rows, counts, me)
  places = before_to[me], counts[me], before_from[me], counts[:, me]
  send = functools.partial(_send, axis)
  return lax.platform_dependent(rows, out, *places, cpu=functools.partial(_emulated, axis),
                                default=send)  # fmt: skip


def _exchange_fwd(rows, counts, room, axis):
  return exchange_rows(rows, counts, room, axis), (counts, rows[:, :0])


def _exchange_bwd(room, axis, residuals, grad):
  counts, like = residuals
  return exchange_rows(grad, counts.T, like.shape[0], axis), None


exchange_rows.defvjp(_exchange_fwd, _exchange_bwd)


def _send(axis, rows, out, starts, sizes, targets, arriving):
  return lax.ragged_all_to_all(rows, out, starts, sizes, targets, arriving, axis_name=axis)


def _emulated(axis, rows, out, starts, sizes, targets, arriving):
  """The same by gathering everything, for XLA:CPU, which does not have the collective."""
  me = lax.axis_index(axis)
  rows, starts, targets = (lax.all_gather(a, axis) for a in (rows, starts, targets))
  place = jnp.arange(out.shape[0])
  source = jnp.searchsorted(jnp.cumsum(arriving), place, side="right")
  there = jnp.minimum(source, arriving.shape[0] - 1)
  index = starts[there, me] + place - targets[there, me]
  taken = rows[there, jnp.clip(index, 0, rows.shape[1] - 1)]
  return jnp.where((source < arriving.shape[0])[:, None], taken, out)
