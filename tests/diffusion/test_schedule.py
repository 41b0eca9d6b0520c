"""Schedules: closed forms, numerics near t = 0, bad input. Laws of all: tests/contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.diffusion import Cosine, Linear, Polynomial

TIMES = np.concatenate([np.logspace(-7, -1, 50), np.linspace(0.1, 1.0, 50)]).astype(np.float32)


@pytest.mark.quick
def test_linear_is_the_reference_mask_rate_to_the_last_digits_of_float32():
  p_mask = (1 - 1e-3) * TIMES.astype(np.float64) + 1e-3
  rate = jax.jit(Linear().mask_rate)(TIMES)
  weight = jax.jit(Linear().weight)(TIMES)
  np.testing.assert_allclose(rate, p_mask, rtol=3e-7)
  np.testing.assert_allclose(weight, (1 - 1e-3) / p_mask, rtol=5e-7)


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_closed_forms(eps):
  t = TIMES.astype(np.float64)
  angle = 0.5 * np.pi * t
  # 1 - alpha in float32 is known to about 6e-8 absolutely, hence to 1e-4 of eps = 1e-3.
  np.testing.assert_allclose(
    Cosine(eps=eps).weight(TIMES),
    (1 - eps) * 0.5 * np.pi * np.cos(angle) / (eps + (1 - eps) * np.sin(angle)),
    rtol=3e-4,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    Polynomial(3.0, eps).weight(TIMES), (1 - eps) * 3 * t**2 / (eps + (1 - eps) * t**3), rtol=3e-4
  )


def test_polynomial_of_power_one_is_linear():
  np.testing.assert_allclose(Polynomial(1.0).alpha(TIMES), Linear().alpha(TIMES), atol=1e-7)
  np.testing.assert_allclose(Polynomial(1.0).weight(TIMES), Linear().weight(TIMES), rtol=2e-4)


def test_weight_keeps_the_shape_of_t_and_differentiates_through_jit_and_vmap():
  t = jnp.asarray(TIMES[:12]).reshape(3, 4)
  assert Cosine().weight(t).shape == (3, 4)
  np.testing.assert_allclose(
    jax.vmap(Cosine().weight)(t), np.stack([Cosine().weight(row) for row in t]), rtol=1e-6
  )


@pytest.mark.parametrize(
  "make", [lambda: Linear(eps=0.0), lambda: Cosine(eps=1.5), lambda: Polynomial(2.0, eps=-1e-3)]
)
def test_eps_out_of_range_is_an_error_with_its_value(make):
  with pytest.raises(ValueError, match="eps.*got"):
    make()


def test_power_below_one_is_an_error():
  with pytest.raises(ValueError, match="power.*got 0.5"):
    Polynomial(0.5)
