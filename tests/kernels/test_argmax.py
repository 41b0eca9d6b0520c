"""Argmax in two stages against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies

from kernels_pallas.argmax import argmax


@given(
  seed=strategies.integers(0, 1 << 20),
  words=strategies.sampled_from([1, 7, 64, 65, 128, 300]),
  levels=strategies.integers(1, 5),
)
def test_the_first_of_equals(seed, words, levels):
  values = np.array([-np.inf, -2.5, -0.0, 0.0, 7.0], np.float32)[:levels]
  x = np.random.default_rng(seed).choice(values, size=(2, 3, words))
  got = jax.jit(argmax)(x)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, np.argmax(x, axis=-1))


@pytest.mark.parametrize("place", [0, 63, 64, 129])
def test_a_nan_is_found_first(place):
  x = np.zeros((1, 130), np.float32)
  x[0, 5], x[0, place] = np.inf, np.nan
  assert argmax(jnp.asarray(x))[0] == place
