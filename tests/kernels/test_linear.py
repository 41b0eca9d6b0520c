"""The linear map's own derivative against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear import linear


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)], ids=str)
def test_values_and_gradients_equal_those_of_dot(shape):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], shape)
  kernel = jax.random.normal(keys[1], (5, 4))
  grad = jax.random.normal(keys[2], (*shape[:-1], 4))

  def run(f):
    out, vjp = jax.vjp(f, x, kernel)
    return out, *vjp(grad)

  for got, want in zip(jax.jit(lambda: run(linear))(), run(jnp.dot), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_bfloat16_accumulates_in_float32():
  x = jnp.ones((1, 4096), jnp.bfloat16)
  out, vjp = jax.vjp(linear, x, jnp.ones((4096, 1), jnp.bfloat16))
  assert out.dtype == jnp.bfloat16 and float(out[0, 0]) == 4096
  dx, dkernel = vjp(jnp.ones_like(out))
  assert dx.dtype == dkernel.dtype == jnp.bfloat16


def test_shapes_that_do_not_fit():
  with pytest.raises(ValueError, match=r"kernel \[D, F\]"):
    linear(jnp.zeros((2, 3)), jnp.zeros((4, 5)))
