"""Unmasking rules by hand. The laws of all rules: tests/contracts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.infer import LowConfidence, Random


def keys(rows, seed=0):
  return jax.vmap(jax.random.key)(np.arange(rows) + 1000 * seed)


@pytest.mark.quick
def test_low_confidence_takes_the_most_confident_of_what_is_masked():
  confidence = jnp.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.3, 0.4, 0.1]])
  masked = jnp.array([[False, True, True, True], [True, True, True, True]])
  commit = LowConfidence()(confidence, masked, jnp.array([2, 1]), keys(2))
  np.testing.assert_array_equal(commit, [[False, True, True, False], [False, False, True, False]])


def test_ties_go_to_the_lowest_position():
  confidence = jnp.full((1, 5), 0.25)
  masked = jnp.array([[False, True, False, True, True]])
  commit = LowConfidence()(confidence, masked, jnp.array([2]), keys(1))
  np.testing.assert_array_equal(commit, [[False, True, False, True, False]])


def test_masked_positions_without_any_confidence_still_come_before_the_rest():
  confidence = jnp.array([[-jnp.inf, 0.5, -jnp.inf, jnp.nan]])
  masked = jnp.array([[True, False, True, True]])
  commit = LowConfidence()(confidence, masked, jnp.array([2]), keys(1))
  np.testing.assert_array_equal(commit, [[True, False, True, False]])


def test_random_is_uniform_over_masked_positions_and_blind_to_confidence():
  rows = 6000
  masked = jnp.broadcast_to(jnp.array([True, False, True, True, True]), (rows, 5))
  confidence = jnp.broadcast_to(jnp.arange(5.0), (rows, 5))
  commit = np.asarray(Random()(confidence, masked, jnp.full(rows, 1), keys(rows)))
  frequency = commit.mean(axis=0)
  np.testing.assert_allclose(frequency[[0, 2, 3, 4]], 0.25, atol=4 * np.sqrt(0.1875 / rows))
  assert frequency[1] == 0
  again = Random()(jnp.zeros((rows, 5)), masked, jnp.full(rows, 1), keys(rows))
  np.testing.assert_array_equal(commit, again)
  other = Random()(confidence, masked, jnp.full(rows, 1), keys(rows, seed=1))
  assert (commit != np.asarray(other)).any()


def test_random_draws_of_a_column_do_not_depend_on_the_width():
  wide = jnp.ones((4, 12), bool)
  narrow = wide.at[:, 8:].set(False)
  budget = jnp.full(4, 3)
  in_wide = Random()(jnp.zeros((4, 12)), narrow, budget, keys(4))
  alone = Random()(jnp.zeros((4, 8)), narrow[:, :8], budget, keys(4))
  np.testing.assert_array_equal(np.asarray(in_wide)[:, :8], alone)
