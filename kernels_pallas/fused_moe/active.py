"""Which experts some token chose, and their slots: what every implementation starts from.

All lists have static lengths, their used part is dynamic: at most min(E, T * k) experts are active.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Active:
  """Slots (token * k + j) sorted by expert; those of no expert here come last.

  Attributes:
    order: int32[T * k], the slot at each sorted place. Stable: tokens keep their order.
    sizes: int32[E], slots per expert.
    starts: int32[E], the place of each expert's first slot.
    experts: int32[min(E, T * k)], ascending, those that have slots; then others.
    count: int32[], how many have slots.
  """

  order: jax.Array
  sizes: jax.Array
  starts: jax.Array
  experts: jax.Array
  count: jax.Array

  @property
  def inverse(self) -> jax.Array:
    """int32[T * k], the sorted place of each slot."""
    places = jnp.arange(self.order.size, dtype=jnp.int32)
    return jnp.zeros_like(self.order).at[self.order].set(places, unique_indices=True)


def find_active(experts: jax.Array, num_experts: int) -> Active:
  """int32[T, k] expert of each slot, anything outside [0, E) being elsewhere -> `Active`."""
  flat = experts.reshape(-1)
  here = (flat >= 0) & (flat < num_experts)
  flat = jnp.where(here, flat, num_experts)
  sizes = (flat[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
  active = jnp.argsort(sizes == 0, stable=True).astype(jnp.int32)
  return Active(
    order=jnp.argsort(flat, stable=True).astype(jnp.int32),
    sizes=sizes,
    starts=jnp.cumsum(sizes, dtype=jnp.int32) - sizes,
    experts=active[: min(num_experts, flat.size)],
    count=(sizes > 0).sum(dtype=jnp.int32),
  )


def sum_slots(rows: jax.Array, experts: jax.Array, active: Active, num_experts: int) -> jax.Array:
  """Each token's sum over its slots that are here, in their own order, float32[T, D].

  Rows come weighted: of two products in one sum the compiler contracts either into a fused
  multiply-add, not always the same one, and results would depend on T.

  Args:
    rows: float32[R, D] by sorted place, R at least T * k; anything where no slot is.
    experts: int32[T, k].
    active: of these experts.
    num_experts: E.
  """
  here = (experts >= 0) & (experts < num_experts)
  inverse = active.inverse.reshape(experts.shape)
  total = jnp.float32(0)
  for j in range(experts.shape[1]):
    total += jnp.where(here[:, j, None], rows[inverse[:, j]], 0)
  return total
