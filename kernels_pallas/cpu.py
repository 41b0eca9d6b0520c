"""What makes XLA fast on a CPU: loops over live row blocks, and products in the layouts it likes.

Rows sorted by group are cut into blocks of a static size, each group starting a block of its own.
The number of blocks is dynamic (only live ones run), their shape is static, so every product is
one dense matmul at full speed. A group's last block reaches into the rows of the next group: those
results are overwritten, since groups are visited in order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


def block_rows(rows: int, groups: int) -> int:
  """Rows per block: the power of two at half the mean group or above, between 32 and 256.

  Larger blocks multiply faster, smaller ones waste less in each group's last block (half a block
  on average). For 8192 rows of width 256 in 16 groups, 128, 192 and 256 made no difference beyond
  noise on a 2-core AVX-512 machine.
  """
  half_mean = max(rows // max(2 * groups, 1), 1)
  return min(256, max(32, 1 << (half_mean - 1).bit_length()))


def for_each_block(
  group_sizes: jax.Array,
  block: int,
  *,
  enter: Callable,
  body: Callable,
  leave: Callable,
  carry,
):
  """Runs `body` on every live block, group by group.

  Args:
    group_sizes: int32[E], rows of each group; groups lie one after another.
    block: rows per block.
    enter: group -> local state, e.g. the group's weights and accumulators.
    body: (start row, bool[block] of rows that belong to the group, carry, local) -> (carry, local).
    leave: (group, carry, local) -> carry.
    carry: what travels through all groups.
  """
  ends = jnp.cumsum(group_sizes)

  def visit(group, carry):
    size = group_sizes[group]
    start = ends[group] - size

    def step(i, state):
      live = i * block + jnp.arange(block) < size
      return body(start + i * block, live, *state)

    carry, local = lax.fori_loop(0, (size + block - 1) // block, step, (carry, enter(group)))
    return leave(group, carry, local)

  return lax.fori_loop(0, group_sizes.shape[0], visit, carry)


def take_rows(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(x, start, count)


def put_rows(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
  return lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, axis=0)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """[m, k] x [k, n] -> float32[m, n].

  Asking for float32 is also what makes bfloat16 fast on a CPU with native bfloat16 products: XLA
  then calls a library that has them (380 against 160 GFLOP/s for 2048^3 on a 2-core AVX-512
  machine, jax 0.10.2).
  """
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def transposed(x: jax.Array) -> jax.Array:
  """The last two axes swapped, and the numbers really moved.

  XLA:CPU would rather hand the product a transposed view, which halves its speed where the left
  factor is transposed, or any factor in bfloat16 (300 against 120 GFLOP/s for a weight gradient
  [256, 4096] x [4096, 256], same machine). Only for code that is lowered for a CPU.
  """
  return with_layout_constraint(jnp.swapaxes(x, -1, -2), Layout(tuple(range(x.ndim))))


def row_sum(x: jax.Array) -> jax.Array:
  """float32[..., D] -> [...]. As a product: XLA:CPU's own reductions take several times as long."""
  return jnp.dot(x, jnp.ones(x.shape[-1]))


def sum_rows(x: jax.Array) -> jax.Array:
  """float32[T, D] -> [D], see `row_sum`."""
  return jnp.dot(jnp.ones(x.shape[0]), x)
