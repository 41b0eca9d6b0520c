"""The laws of each kind of strategy, for every strategy there is.

Classes are found by search, so a new one is tested as soon as its module is imported: it needs
defaults for its fields, and no test file.
"""

import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lladax.diffusion
import lladax.infer
from lladax.diffusion import Normalization, Objective, Schedule, TimeSampler, Weighting
from lladax.diffusion.forward import time_key
from lladax.infer import EosPolicy, Unmask
from lladax.types import Batch


def strategies(kind: type) -> list:
  """One instance by default of every concrete class of a kind that this project defines."""
  found, waiting = [], [kind]
  while waiting:
    for subclass in waiting.pop().__subclasses__():
      waiting.append(subclass)
      if not inspect.isabstract(subclass) and subclass.__module__.startswith("lladax."):
        found.append(subclass())
  return sorted(set(found), key=repr)


def of(kind: type):
  return pytest.mark.parametrize("strategy", strategies(kind), ids=repr)


@pytest.mark.parametrize(
  "kind,least",
  [
    (Schedule, 3),
    (TimeSampler, 4),
    (Weighting, 2),
    (Normalization, 3),
    (Unmask, 2),
    (EosPolicy, 3),
  ],
)
def test_the_search_finds_them_and_they_are_values(kind, least):
  found = strategies(kind)
  assert len(found) >= least
  for strategy in found:  # static under jit: hashable, equal when built alike
    assert type(strategy)() == strategy and hash(type(strategy)()) == hash(strategy)
    assert eval(repr(strategy), vars(lladax.diffusion) | vars(lladax.infer)) == strategy


@of(Schedule)
def test_alpha_falls_from_one_to_zero(strategy):
  alpha = np.asarray(strategy.alpha(jnp.linspace(0.0, 1.0, 1001)), np.float64)
  assert abs(alpha[0] - 1) < 0.02 and abs(alpha[-1]) < 0.02
  assert (np.diff(alpha) <= 1e-7).all()
  assert (np.diff(alpha[::50]) < 0).all()


@of(Schedule)
def test_mask_rate_is_what_alpha_leaves_and_never_zero(strategy):
  t = jnp.linspace(0.0, 1.0, 1001)
  rate = np.asarray(strategy.mask_rate(t), np.float64)
  np.testing.assert_allclose(rate, 1 - np.asarray(strategy.alpha(t), np.float64), atol=2e-7)
  assert (rate > 0).all() and (rate <= 1).all()


@of(Schedule)
def test_weight_is_positive_finite_and_matches_finite_differences(strategy):
  t = jnp.linspace(0.02, 0.98, 97)
  weight = np.asarray(strategy.weight(t), np.float64)
  h = 1e-2
  ends = [np.asarray(strategy.alpha(t + s * h), np.float64) for s in (1, -1)]
  expected = -(ends[0] - ends[1]) / (2 * h) / np.asarray(strategy.mask_rate(t), np.float64)
  np.testing.assert_allclose(weight, expected, rtol=2e-3, atol=1e-4)
  everywhere = np.asarray(strategy.weight(jnp.linspace(1e-6, 1.0, 1001)))
  assert np.isfinite(everywhere).all()
  assert (everywhere[:-1] > 0).all() and everywhere[-1] >= -1e-6


@of(TimeSampler)
def test_times_lie_in_the_unit_interval_and_are_a_function_of_the_key(strategy):
  for rows in (1, 2, 7, 16):
    t = np.asarray(strategy(time_key(0, 5), rows))
    assert t.shape == (rows,) and t.dtype == np.float32
    assert (t > 0).all() and (t <= 1).all()
    np.testing.assert_array_equal(t, strategy(time_key(0, 5), rows))
    assert (t != np.asarray(strategy(time_key(0, 6), rows))).any()


@of(TimeSampler)
def test_every_row_alone_is_uniform_over_its_range(strategy):
  steps, rows = 3000, 6
  times = jax.jit(jax.vmap(lambda step: strategy(time_key(1, step), rows)))(jnp.arange(steps))
  low, high = getattr(strategy, "low", 0.0), getattr(strategy, "high", 1.0)
  unit = np.sort((np.asarray(times, np.float64) - low) / (high - low), axis=0)  # [steps, rows]
  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.999 quantile; six rows of four samplers.
  ranks = (np.arange(steps)[:, None] + 0.5) / steps
  assert (np.abs(unit - ranks).max(axis=0) < 2.2 / np.sqrt(steps)).all()


def toy_batch(maskable) -> Batch:
  ones = np.ones((3, 4), np.int32)
  return Batch(tokens=ones, segment_ids=ones, positions=ones, maskable=np.asarray(maskable, bool))


@of(Weighting)
def test_weights_are_positive_and_finite_for_every_schedule(strategy):
  for schedule in strategies(Schedule):
    weight = np.asarray(strategy(schedule, jnp.linspace(1e-6, 0.999, 200)))
    assert weight.shape == (200,) and (weight > 0).all() and np.isfinite(weight).all()


@of(Normalization)
@pytest.mark.parametrize("maskable", [np.ones((3, 4)), np.zeros((3, 4)), np.eye(3, 4)])
def test_divisors_are_at_least_one_and_never_spoil_the_weights(strategy, maskable):
  objective = Objective(normalize=strategy)
  noised = objective.noise(toy_batch(maskable), 0, 0, mask_id=9)
  divisor = np.asarray(strategy(toy_batch(maskable), noised))
  assert np.broadcast_shapes(divisor.shape, (3, 4)) == (3, 4)
  assert (divisor >= 1).all()
  weights = np.asarray(noised.weights)
  assert np.isfinite(weights).all()
  np.testing.assert_array_equal(weights > 0, noised.is_masked)


def row_keys(rows: int, seed: int):
  return jax.vmap(lambda r: jax.random.fold_in(jax.random.key(seed), r))(jnp.arange(rows))


@of(Unmask)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), masked_rate=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_a_rule_writes_only_what_is_masked_and_makes_progress(strategy, seed, masked_rate):
  rng = np.random.default_rng(seed)
  rows, width = 3, 8
  masked = rng.random((rows, width)) < masked_rate
  confidence = rng.choice([-1.0, 0.0, 0.25, 0.5, 0.999, 1.0], size=(rows, width))
  budget = rng.integers(0, width + 1, size=rows).astype(np.int32)
  args = jnp.float32(confidence), jnp.asarray(masked), jnp.asarray(budget)
  commit = np.asarray(strategy(*args, row_keys(rows, seed)))
  assert commit.shape == masked.shape and commit.dtype == bool
  assert not (commit & ~masked).any()
  due = masked.any(axis=1) & (budget > 0)
  assert (commit.any(axis=1) >= due).all()
  # A row's choice is its own: the same when it stands alone.
  row = seed % rows
  alone = strategy(*(x[row : row + 1] for x in args), row_keys(rows, seed)[row : row + 1])
  np.testing.assert_array_equal(alone[0], commit[row])


@of(EosPolicy)
def test_an_eos_policy_touches_eos_only_and_never_favours_it(strategy):
  rng = np.random.default_rng(0)
  eos, logits = (2, 5), rng.normal(size=(3, 4, 8)).astype(np.float32)
  others = [i for i in range(8) if i not in eos]
  changed = np.asarray(strategy.logits(jnp.asarray(logits), eos))
  np.testing.assert_array_equal(changed[..., others], logits[..., others])
  assert (changed <= logits).all()
  tokens, confidence = rng.integers(0, 8, size=(3, 4)), rng.random((3, 4)).astype(np.float32)
  lowered = np.asarray(strategy.confidence(jnp.asarray(confidence), tokens, eos))
  plain = ~np.isin(tokens, eos)
  np.testing.assert_array_equal(lowered[plain], confidence[plain])
  assert (lowered <= confidence).all() and not np.isnan(lowered).any()
