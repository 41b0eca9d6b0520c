"""To expert order and back, the meaning: the three gathers that every back end offers.

A slot is one of a token's k experts, numbered token * k + j. Rows are the slots that are computed
here, sorted by expert: `order` says which slot a row is, `inverse` which row a slot has. Either may
point outside: rows that are padding, slots that are computed elsewhere or nowhere.

A back end is a module with these three functions under these signatures; `api.py` makes the two ops
and their derivatives of them. None of them adds at an index: a scatter is slow on every platform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of `x`.

  Args:
    x: [T, D].
    index: int32[R]. Outside 0 <= index < T: padding.

  Returns:
    [R, D] in the dtype of `x`, row r being x[index[r]], zero where that is padding.
  """
  present = (index >= 0) & (index < x.shape[0])
  return jnp.where(present[:, None], x[jnp.where(present, index, 0)], 0)


def gather_scaled(
  x: jax.Array, index: jax.Array, scale: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Rows of `x` times a number each, and their products with other rows: what `combine` transposes.

  Args:
    x: [T, D], a gradient of combined rows.
    index: int32[R]. Outside 0 <= index < T: padding.
    scale: float32[R].
    rows: [R, D], the rows that were combined; anything, NaN included, where `index` is padding.

  Returns:
    [R, D] in the dtype of `rows`: scale[r] * x[index[r]], multiplied in float32, and
    float32[R]: <rows[r], x[index[r]]>. Both zero where `index` is padding.
  """
  taken = gather(x, index).astype(jnp.float32)
  present = (index >= 0) & (index < x.shape[0])
  products = jnp.where(present[:, None], rows.astype(jnp.float32), 0) * taken
  scaled = jnp.where(present, scale, 0)[:, None] * taken
  return scaled.astype(rows.dtype), products.sum(1)


def weighted_combine(rows: jax.Array, weights: jax.Array | None, inverse: jax.Array) -> jax.Array:
  """Each token's weighted sum over its k rows.

  Args:
    rows: [R, D]; rows that no slot points to may hold anything, NaN included.
    weights: float32[T, k]; None: all 1.
    inverse: int32[T, k]. Outside 0 <= inverse < R: the slot is not here and contributes nothing,
      whatever its weight.

  Returns:
    [T, D] in the dtype of `rows`, summed in float32.
  """
  slots = gather(rows, inverse.reshape(-1)).astype(jnp.float32).reshape(*inverse.shape, -1)
  if weights is not None:
    present = (inverse >= 0) & (inverse < rows.shape[0])
    slots = jnp.where(present, weights, 0)[..., None] * slots
  return slots.sum(1).astype(rows.dtype)
