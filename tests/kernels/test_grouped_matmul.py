"""Every implementation of the grouped matmul against the one-hot reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import IMPLEMENTATIONS, grouped_matmul

SIZES = [
  pytest.param([5, 0, 7, 4], id="an_empty_group"),
  pytest.param([0, 0, 16, 0], id="all_in_one"),
  pytest.param([3, 2, 1, 4], id="rows_beyond_the_groups"),
  pytest.param([0, 0, 0, 0], id="no_rows_at_all"),
]


def operands(sizes, rows=16, width=8, out=6, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  lhs = jax.random.normal(keys[0], (rows, width), dtype)
  rhs = jax.random.normal(keys[1], (len(sizes), width, out), dtype)
  grad = jax.random.normal(keys[2], (rows, out), dtype)
  return lhs, rhs, jnp.array(sizes, jnp.int32), grad


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_values_and_gradients_equal_the_reference(implementation, sizes):
  lhs, rhs, sizes, grad = operands(sizes)

  def run(name):
    out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, implementation=name), lhs, rhs)
    return out, *vjp(grad)

  for got, want in zip(
    jax.jit(run, static_argnums=0)(implementation), run("reference"), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["live_blocks", "ragged_dot"])
def test_rows_beyond_the_groups_may_hold_anything(implementation):
  lhs, rhs, sizes, grad = operands([3, 2, 1, 4])
  poisoned = lhs.at[10:].set(jnp.nan), grad.at[10:].set(jnp.nan)

  def run(lhs, grad):
    out, vjp = jax.vjp(
      lambda a, b: grouped_matmul(a, b, sizes, implementation=implementation), lhs, rhs
    )
    return out, *vjp(grad)

  for got, want in zip(run(*poisoned), run(lhs, grad), strict=True):
    np.testing.assert_array_equal(got, want)


def test_many_blocks_and_ragged_tails():
  sizes = [700, 1, 0, 299, 24]
  lhs, rhs, sizes, grad = operands(sizes, rows=1024, width=4, out=4)

  def run(name):
    out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, implementation=name), lhs, rhs)
    return out, *vjp(grad)

  for got, want in zip(run("live_blocks"), run("reference"), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
  lhs, rhs, sizes, _ = operands([5, 0, 7, 4], width=512, dtype=jnp.bfloat16)
  exact = grouped_matmul(
    lhs.astype(jnp.float32), rhs.astype(jnp.float32), sizes, implementation="reference"
  )
  got = grouped_matmul(lhs, rhs, sizes, implementation="live_blocks")
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
  "lhs, rhs, sizes, message",
  [
    ((4, 3), (2, 5, 6), (2,), r"expected lhs \[T, D\]"),
    ((4, 3), (2, 3, 6), (3,), r"group_sizes \[2\]"),
  ],
)
def test_shapes_that_do_not_fit(lhs, rhs, sizes, message):
  with pytest.raises(ValueError, match=message):
    grouped_matmul(jnp.zeros(lhs), jnp.zeros(rhs), jnp.zeros(sizes, jnp.int32))


def test_unknown_implementation():
  with pytest.raises(ValueError, match="'cuda'.*live_blocks"):
    grouped_matmul(*operands([5, 0, 7, 4])[:3], implementation="cuda")
