"""From a routing decision to expert order and back: the plan of one dispatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Plan:
  """Slots (slot = token * k + j) of some experts, sorted by expert, in a buffer of R rows.

  Attributes:
    order: int32[R], the slot at each place; T * k where there is none. Stable: tokens keep their
      order.
    inverse: int32[T * k], the place of each slot; R if it has none here.
    group_sizes: int32[E], slots per expert.
    dropped: int32[], slots of these experts for which the buffer had no room.
  """

  order: jax.Array
  inverse: jax.Array
  group_sizes: jax.Array
  dropped: jax.Array

  @property
  def experts(self) -> jax.Array:
    """int32[T * k], the expert of each slot among these E; E if it has no place here."""
    ends = jnp.cumsum(self.group_sizes)
    return jnp.searchsorted(ends, self.inverse, side="right").astype(jnp.int32)


def make_plan(
  experts: jax.Array, num_experts: int, *, first: int | jax.Array = 0, room: int | None = None
) -> Plan:
  """The plan of experts `first` to `first + num_experts`.

  Args:
    experts: int32[T, k], the expert of each slot, distinct within a token.
    num_experts: how many experts are here.
    first: the first of them.
    room: R; None: as many as T tokens can need, T * min(k, num_experts).
  """
  tokens, k = experts.shape
  slots = tokens * k
  room = min(tokens * min(k, num_experts) if room is None else room, slots)
  expert = experts.reshape(-1) - first
  expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
  order = jnp.argsort(expert, stable=True).astype(jnp.int32)
  places = jnp.arange(slots, dtype=jnp.int32)
  inverse = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
  ends = jnp.cumsum((expert[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32))
  live, ends = ends[-1], jnp.minimum(ends, room)
  return Plan(
    order=jnp.where(places[:room] < live, order[:room], slots),
    inverse=jnp.where(inverse < ends[-1], inverse, room),
    group_sizes=jnp.diff(ends, prepend=jnp.zeros((1,), ends.dtype)),
    dropped=live - ends[-1],
  )
