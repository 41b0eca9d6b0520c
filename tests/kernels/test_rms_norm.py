"""RMSNorm's own derivative against differentiation of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.rms_norm import rms_norm


def formula(x, scale, eps):
  high = x.astype(jnp.float32)
  high = high * jax.lax.rsqrt(jnp.mean(jnp.square(high), -1, keepdims=True) + eps)
  return high.astype(x.dtype) * scale.astype(x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 16), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_derivative_equal_the_formula(shape, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x, grad = (3 * jax.random.normal(key, shape, dtype) for key in keys[:2])
  scale = 1 + 0.3 * jax.random.normal(keys[2], shape[-1:])
  got, vjp = jax.vjp(lambda x, s: rms_norm(x, s, 1e-5), x, scale)
  want, formula_vjp = jax.vjp(lambda x, s: formula(x, s, 1e-5), x, scale)
  tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
  assert got.dtype == dtype
  for a, b in zip((got, *vjp(grad)), (want, *formula_vjp(grad)), strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def test_eps_bounds_rows_of_zeros():
  x, scale = jnp.zeros((2, 8)), jnp.ones(8)
  out, vjp = jax.vjp(lambda x: rms_norm(x, scale, 1e-6), x)
  np.testing.assert_array_equal(out, 0)
  assert np.isfinite(vjp(jnp.ones_like(x))[0]).all()
