"""Grouped matmul, the meaning: every row is multiplied by the matrix of its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Dense one-hot form: E times the work, no cleverness.

  Args:
    lhs: [T, D], rows sorted by group.
    rhs: [E, D, F].
    group_sizes: int32[E]. Rows beyond their sum belong to no group.

  Returns:
    [T, F] in the dtype of `lhs`, summed in float32; zero in rows that belong to no group.
  """
  ends = jnp.cumsum(group_sizes)
  rows = jnp.arange(lhs.shape[0])[:, None]
  member = (rows < ends) & (rows >= ends - group_sizes)  # [T, E]
  products = jnp.einsum("td,edf->tef", lhs, rhs, preferred_element_type=jnp.float32)
  return jnp.where(member[..., None], products, 0).sum(1).astype(lhs.dtype)
