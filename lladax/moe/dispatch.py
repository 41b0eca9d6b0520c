"""From a routing decision to expert order and back: the plan of one dropless dispatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Plan:
  """T * k slots (slot = token * k + j) sorted by expert.

  Attributes:
    order: int32[T * k], the slot at each sorted place. Stable: tokens keep their order.
    inverse: int32[T * k], the sorted place of each slot.
    group_sizes: int32[E], slots per expert.
  """

  order: jax.Array
  inverse: jax.Array
  group_sizes: jax.Array


def make_plan(experts: jax.Array, num_experts: int) -> Plan:
  """int32[T, k] expert of each slot -> `Plan`."""
  flat = experts.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  places = jnp.arange(flat.size, dtype=jnp.int32)
  inverse = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
  group_sizes = (flat[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
  return Plan(order=order, inverse=inverse, group_sizes=group_sizes)
