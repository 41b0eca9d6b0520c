"""Grouped matmul, the meaning: every row is multiplied by the matrix of its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Dense one-hot form: E times the work, no cleverness.

  Args:
    lhs: [R, D], rows sorted by group.
    rhs: [E, D, F].
    group_sizes: int32[E]. Rows beyond their sum belong to no group.

  Returns:
    [R, F] in the dtype of `lhs`, summed in float32; zero in rows that belong to no group.
  """
  return _product(lhs, rhs, group_sizes).astype(lhs.dtype)


def grouped_swiglu(lhs: jax.Array, gate_up: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """silu(lhs gate) * (lhs up), [R, F] for gate_up [E, D, 2F]; rounded to a dtype only at the end."""
  gate, up = jnp.split(_product(lhs, gate_up, group_sizes), 2, axis=1)
  return (jax.nn.silu(gate) * up).astype(lhs.dtype)


def _product(lhs, rhs, group_sizes):
  ends = jnp.cumsum(group_sizes)
  rows = jnp.arange(lhs.shape[0])[:, None]
  member = (rows < ends) & (rows >= ends - group_sizes)  # [R, E]
  products = jnp.einsum("rd,edf->ref", lhs, rhs, preferred_element_type=jnp.float32)
  return jnp.where(member[..., None], products, 0).sum(1)
