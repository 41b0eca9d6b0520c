"""Unmasking rules by hand. The laws of all rules: tests/contracts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.infer import (
  Entropy,
  Factor,
  Hierarchical,
  LowConfidence,
  Margin,
  Origin,
  Random,
  Threshold,
  ThresholdOrBudget,
)
from lladax.infer.unmasking import best_of_runs

FIRST = np.zeros(1, np.int32)  # the iteration, for rules that do not read it


@functools.partial(jax.jit, static_argnums=0)
def keys(rows, seed=0):
  return jax.vmap(jax.random.key)(jnp.arange(rows) + 100_000 * seed)


@functools.partial(jax.jit, static_argnums=0)
def choose(rule, confidence, masked, budget, keys, iteration=FIRST):
  return rule(confidence, masked, budget, keys, iteration)


@pytest.mark.quick
def test_low_confidence_takes_the_most_confident_of_what_is_masked():
  confidence = jnp.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.3, 0.4, 0.1]])
  masked = jnp.array([[False, True, True, True], [True, True, True, True]])
  commit = choose(LowConfidence(), confidence, masked, jnp.array([2, 1]), keys(2))
  np.testing.assert_array_equal(commit, [[False, True, True, False], [False, False, True, False]])


def test_ties_go_to_the_lowest_position():
  confidence = jnp.full((1, 5), 0.25)
  masked = jnp.array([[False, True, False, True, True]])
  commit = choose(LowConfidence(), confidence, masked, jnp.array([2]), keys(1))
  np.testing.assert_array_equal(commit, [[False, True, False, True, False]])


def test_masked_positions_without_any_confidence_still_come_before_the_rest():
  confidence = jnp.array([[-jnp.inf, 0.5, -jnp.inf, jnp.nan]])
  masked = jnp.array([[True, False, True, True]])
  commit = choose(LowConfidence(), confidence, masked, jnp.array([2]), keys(1))
  np.testing.assert_array_equal(commit, [[True, False, True, False]])


def test_random_is_uniform_over_masked_positions_and_blind_to_confidence():
  rows = 6000
  masked = jnp.broadcast_to(jnp.array([True, False, True, True, True]), (rows, 5))
  confidence = jnp.broadcast_to(jnp.arange(5.0), (rows, 5))
  commit = np.asarray(choose(Random(), confidence, masked, jnp.full(rows, 1), keys(rows)))
  frequency = commit.mean(axis=0)
  np.testing.assert_allclose(frequency[[0, 2, 3, 4]], 0.25, atol=4 * np.sqrt(0.1875 / rows))
  assert frequency[1] == 0
  again = choose(Random(), jnp.zeros((rows, 5)), masked, jnp.full(rows, 1), keys(rows))
  np.testing.assert_array_equal(commit, again)
  other = choose(Random(), confidence, masked, jnp.full(rows, 1), keys(rows, seed=1))
  assert (commit != np.asarray(other)).any()


def test_random_draws_of_a_column_do_not_depend_on_the_width():
  wide = jnp.ones((4, 12), bool)
  narrow = wide.at[:, 8:].set(False)
  budget = jnp.full(4, 3)
  in_wide = choose(Random(), jnp.zeros((4, 12)), narrow, budget, keys(4))
  alone = choose(Random(), jnp.zeros((4, 8)), narrow[:, :8], budget, keys(4))
  np.testing.assert_array_equal(np.asarray(in_wide)[:, :8], alone)


@pytest.mark.quick
def test_every_run_gives_its_most_confident_position():
  masked = jnp.array([[True, True, False, True, True, True, False, True]])
  confidence = jnp.array([[0.7, 0.75, 0.99, 0.6, 0.6, 0.2, 0.99, 0.3]])
  chosen = best_of_runs(confidence, masked)
  np.testing.assert_array_equal(np.flatnonzero(chosen), [1, 3, 7])
  commit = choose(Hierarchical(0.9, 0.4), confidence, masked, jnp.array([0]), keys(1))
  np.testing.assert_array_equal(np.flatnonzero(commit), [1, 3])  # 7 is below the low threshold


def test_a_run_is_halved_until_it_is_written():
  """Confidence that is highest far from what is written: about log2 of the width iterations."""
  width, masked, iterations = 64, np.ones((1, 64), bool), 0
  while masked.any():
    places = np.flatnonzero(np.pad(~masked[0], 1, constant_values=True)) - 1
    distance = np.min(np.abs(np.arange(width)[:, None] - places), axis=1)
    confidence = jnp.asarray(0.5 + 0.4 * distance[None] / width, jnp.float32)
    rule = Hierarchical(0.95, 0.4)
    masked &= ~np.asarray(choose(rule, confidence, jnp.asarray(masked), jnp.array([0]), keys(1)))
    iterations += 1
  assert iterations == 7


def test_threshold_writes_all_that_reach_it_or_the_one_that_comes_nearest():
  confidence = jnp.array([[0.95, 0.9, 0.3, 0.99], [0.2, 0.1, 0.5, 0.4], [0.2, 0.6, 0.6, 0.1]])
  masked = jnp.array([[True, True, True, False], [True] * 4, [True] * 4])
  nothing = jnp.zeros(3, jnp.int32)  # budgets
  expected = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]], bool)
  np.testing.assert_array_equal(
    choose(Threshold(0.9), confidence, masked, nothing, keys(3)), expected
  )
  expected[2, 2] = False  # without slack one of two that are equal
  rule = Threshold(0.9, slack=0.0)
  np.testing.assert_array_equal(choose(rule, confidence, masked, nothing, keys(3)), expected)


@pytest.mark.parametrize("rule", [Threshold(), ThresholdOrBudget(), Factor(), Hierarchical()])
def test_rules_that_go_by_confidence_make_progress_without_a_budget(rule):
  confidence = jnp.array([[0.2, 0.1], [0.0, 0.0], [jnp.nan, jnp.nan], [-jnp.inf, -1.0]])
  masked = jnp.array([[True, True], [True, True], [False, True], [True, True]])
  commit = choose(rule, confidence, masked, jnp.zeros(4, jnp.int32), keys(4))
  assert commit.any(axis=1).all()


def test_a_threshold_that_falls_reaches_its_end_and_stays():
  confidence = jnp.array([[0.99, 0.97, 0.85, 0.7]] * 4)
  rule = Threshold(0.8, start=1.0, decay=0.02)
  iterations = jnp.array([0, 2, 10, 40])
  commit = choose(rule, confidence, jnp.ones((4, 4), bool), jnp.zeros(4, int), keys(4), iterations)
  np.testing.assert_array_equal(np.sum(commit, axis=1), [1, 2, 3, 3])


def test_factor_stops_at_the_first_that_fails():
  # The second needs 2/3, the third 3/4, the fourth 4/5.
  confidence = jnp.array([[0.5, 0.7, 0.74, 0.9], [0.8, 0.8, 0.8, 0.8], [0.1, 0.2, 0.1, 0.1]])
  budget = jnp.zeros(3, jnp.int32)
  commit = choose(Factor(), confidence, jnp.ones((3, 4), bool), budget, keys(3))
  expected = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]]
  np.testing.assert_array_equal(commit, np.array(expected, bool))


def test_the_budget_is_the_fallback_of_the_threshold():
  confidence = jnp.array([[0.99, 0.5, 0.4, 0.3], [0.99, 0.98, 0.97, 0.3]])
  rule = ThresholdOrBudget(0.95)
  commit = choose(rule, confidence, jnp.ones((2, 4), bool), jnp.array([2, 2]), keys(2))
  np.testing.assert_array_equal(commit, np.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool))


def test_margin_and_entropy_rank_by_the_distribution_and_not_by_the_token_drawn():
  logits = jnp.log(
    jnp.array([[[0.5, 0.49, 0.01, 0.0], [0.4, 0.2, 0.2, 0.2], [0.3, 0.3, 0.4, 0.0]]])
  )
  drawn = jnp.array([[2, 0, 1]])
  np.testing.assert_allclose(Margin().score(logits, drawn), [[0.01, 0.2, 0.1]], atol=1e-6)
  p = np.exp(np.asarray(logits, np.float64))
  expected = np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=-1)
  np.testing.assert_allclose(Entropy().score(logits, drawn), expected, rtol=1e-5)
  np.testing.assert_allclose(LowConfidence().score(logits, drawn), [[0.01, 0.4, 0.3]], rtol=1e-5)


@pytest.mark.parametrize("rule", [LowConfidence(alg_temp=0.5), Entropy(alg_temp=0.5)])
def test_positions_are_drawn_without_replacement_by_the_softmax_of_confidence(rule):
  rows = 6000
  confidence, masked = np.array([0.9, 0.2, 5.0, -0.5]), np.array([True, True, False, True])
  weight = np.where(masked, np.exp(confidence / 0.5), 0)
  p = weight / weight.sum()
  rows_of = lambda x: jnp.broadcast_to(jnp.asarray(x), (rows, 4))  # noqa: E731
  commit = np.asarray(
    choose(rule, rows_of(np.float32(confidence)), rows_of(masked), jnp.full(rows, 2), keys(rows))
  )
  assert (commit.sum(axis=1) == 2).all() and not commit[:, 2].any()
  for first, second in [(0, 1), (0, 3), (1, 3)]:
    a, b = p[first], p[second]
    expected = a * b / (1 - a) + b * a / (1 - b)
    frequency = (commit[:, first] & commit[:, second]).mean()
    assert abs(frequency - expected) < 4 * np.sqrt(expected * (1 - expected) / rows)


def test_origin_writes_each_masked_position_with_the_same_probability():
  rows = 6000
  masked = jnp.broadcast_to(jnp.array([True, False, True, True, True]), (rows, 5))
  commit = np.asarray(
    choose(Origin(), jnp.zeros((rows, 5)), masked, jnp.full(rows, 1.2), keys(rows))
  )
  assert not commit[:, 1].any() and commit.any(axis=1).all()
  places = commit[:, [0, 2, 3, 4]]
  # Four draws of 0.3 each; where all fail, one of the four is written.
  expected = 0.3 + 0.7**4 / 4
  np.testing.assert_allclose(places.mean(axis=0), expected, atol=4 * np.sqrt(0.25 / rows))
  both = (places[:, 0] & places[:, 1]).mean()
  assert abs(both - 0.09) < 4 * np.sqrt(0.09 * 0.91 / rows)
  everything = choose(Origin(), jnp.zeros((rows, 5)), masked, jnp.full(rows, 4.0), keys(rows))
  np.testing.assert_array_equal(everything, masked)


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: Threshold(9), "threshold of Threshold lies between 0 and 1; got 9"),
    (lambda: Threshold(start=2.0), "start of Threshold lies between 0 and 1; got 2.0"),
    (lambda: ThresholdOrBudget(-1.0), "threshold of ThresholdOrBudget .* got -1.0"),
    (lambda: Hierarchical(0.4, 0.6), "low_threshold 0.6 is above threshold 0.4"),
    (lambda: Factor(float("nan")), "factor is a finite number of at least 0; got nan"),
    (lambda: Margin(alg_temp=-0.1), "alg_temp is a finite number of at least 0; got -0.1"),
  ],
)
def test_numbers_that_do_not_fit_are_errors(make, message):
  with pytest.raises(ValueError, match=message):
    make()
