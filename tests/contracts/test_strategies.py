"""The laws of each kind of strategy, for every strategy there is.

Classes are found by search, so a new one is tested as soon as its module is imported: it needs
defaults for its fields, and no test file.
"""

import functools
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
from lladax.infer import Edit, EosPolicy, LowEosConfidence, StepSchedule, Unmask
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
    (Unmask, 9),
    (StepSchedule, 2),
    (Edit, 2),
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


@functools.partial(jax.jit, static_argnums=0)
def row_keys(rows: int, seed: int):
  return jax.vmap(lambda r: jax.random.fold_in(jax.random.key(seed), r))(jnp.arange(rows))


@functools.partial(jax.jit, static_argnums=0)
def unmask(strategy, confidence, masked, budget, keys, iteration):
  return strategy(confidence, masked, budget, keys, iteration)


@of(Unmask)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**30), masked_rate=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_a_rule_writes_only_what_is_masked_and_makes_progress(strategy, seed, masked_rate):
  rng = np.random.default_rng(seed)
  rows, width = 3, 8
  masked = rng.random((rows, width)) < masked_rate
  levels = [-1.0, 0.0, 0.25, 0.5, 0.9, 0.999, 1.0] + [np.nan, -np.inf] * (seed % 4 == 0)
  confidence = rng.choice(levels, size=(rows, width)).astype(np.float32)
  most = rng.choice([0.25, 0.5, 0.9, 1.0], size=(rows, 1))  # rows that are sure, and hesitant ones
  confidence = np.where(confidence > most, most, confidence).astype(np.float32)
  budget = rng.choice([0.0, 0.4, 1.0, 1.6, 3.0, width], size=rows).astype(np.float32)
  iteration = rng.integers(0, 60, size=rows).astype(np.int32)
  keys = row_keys(rows, seed)
  commit = np.asarray(unmask(strategy, confidence, masked, budget, keys, iteration))
  assert commit.shape == masked.shape and commit.dtype == bool
  assert not (commit & ~masked).any()
  due = masked.any(axis=1) & (budget >= 1)
  assert (commit.any(axis=1) >= due).all()
  # A row's choice is its own, whatever the others hold.
  row = seed % rows
  mine = np.arange(rows) == row
  others = rng.random((rows, width)) * rng.choice([0.1, 1.0]), np.ones_like(masked), budget[::-1]
  mixed = unmask(
    strategy,
    np.where(mine[:, None], confidence, others[0]).astype(np.float32),
    np.where(mine[:, None], masked, others[1]),
    np.where(mine, budget, others[2]),
    jnp.where(mine, keys, row_keys(rows, seed + 1)),
    np.where(mine, iteration, 7),
  )
  np.testing.assert_array_equal(mixed[row], commit[row])
  # What is not masked does not matter, nor how much of it there is.
  other = np.where(masked, confidence, rng.choice(levels, size=masked.shape))
  other = np.pad(other.astype(np.float32), ((0, 0), (0, 4)), constant_values=1.0)
  wide = unmask(strategy, other, np.pad(masked, ((0, 0), (0, 4))), budget, keys, iteration)
  np.testing.assert_array_equal(wide, np.pad(commit, ((0, 0), (0, 4))))


@of(Unmask)
def test_a_score_is_of_its_position_alone_and_needs_no_mask(strategy):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 5, 9)).astype(np.float32) * 6
  logits[..., 8] = -np.inf  # MASK
  drawn = rng.integers(0, 8, size=(3, 5)).astype(np.int32)
  read = jax.jit(strategy.score)
  score = np.asarray(read(logits, drawn))
  assert score.shape == drawn.shape and score.dtype == np.float32
  assert np.isfinite(score).all() and (score <= 1 + 1e-6).all()
  elsewhere = rng.normal(size=logits.shape).astype(np.float32)
  elsewhere[1, 3] = logits[1, 3]
  assert np.asarray(read(elsewhere, drawn))[1, 3] == score[1, 3]
  np.testing.assert_allclose(read(logits + 3, drawn), score, rtol=1e-4, atol=1e-6)
  certain = np.where(np.arange(9) == 4, np.float32(50), logits)
  assert (np.asarray(read(certain, np.full_like(drawn, 4))) >= score - 1e-6).all()


@of(Unmask)
def test_an_end_that_is_discouraged_comes_after_everything_else(strategy):
  """However flat the rest and however sure the end, in the scale of every score."""
  drawn = jnp.array([[3, 5]])
  logits = jnp.zeros((1, 2, 160_000)).at[0, 1, 5].set(90.0)
  lowered = LowEosConfidence().confidence(strategy.score(logits, drawn), drawn, (5, 7))
  assert lowered[0, 1] < lowered[0, 0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def budget_of(schedule, at_start, left, iteration, steps):
  return schedule(at_start, left, iteration, steps)


@of(Unmask)
def test_every_rule_with_every_schedule_ends_in_time(strategy):
  rows, width, steps = 3, 8, 11
  confidence = np.random.default_rng(0).random((rows, width)).astype(np.float32)
  start = np.arange(width) < np.array([[8], [5], [0]])
  for schedule in strategies(StepSchedule):
    masked = start
    for iteration in range(steps):
      counts = start.sum(axis=1, dtype=np.int32), masked.sum(axis=1, dtype=np.int32)
      budget = np.float32(budget_of(schedule, *counts, iteration, steps))
      numbers = np.full(rows, iteration, np.int32)
      choice = unmask(strategy, confidence, masked, budget, row_keys(rows, iteration), numbers)
      masked = masked & ~np.asarray(choice)
    assert not masked.any()


@of(StepSchedule)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_schedule_gives_out_what_there_is_and_no_more(strategy, steps):
  at_start = np.array([0, 1, 7, 8, 40], np.int32)
  left, given_out = at_start.copy(), np.zeros(5, np.int32)
  for iteration in range(steps + 2):
    budget = np.asarray(budget_of(strategy, at_start, left, iteration, steps))
    assert budget.shape == (5,) and (budget >= 0).all() and (budget <= left).all()
    by_row = budget_of(
      strategy, at_start, left, np.full(5, iteration), steps
    )  # rows may be at different ones
    np.testing.assert_allclose(by_row, budget, rtol=1e-6)
    if iteration >= steps - 1:
      np.testing.assert_array_equal(budget, left)
    left, given_out = left - budget.astype(int), given_out + budget.astype(int)
  np.testing.assert_array_equal(given_out, at_start)
  whole = budget_of(strategy, at_start, left, 0, steps)
  turned = budget_of(strategy, at_start[::-1].copy(), left[::-1].copy(), 0, steps)
  np.testing.assert_array_equal(turned[::-1], whole)  # a row's own, whatever the others


@functools.partial(jax.jit, static_argnums=0)
def edit(strategy, state):
  return strategy(**state)


@of(Edit)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**30), masked_rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_an_edit_touches_only_what_was_written_and_lets_masks_fall(strategy, seed, masked_rate):
  rng = np.random.default_rng(seed)
  rows, shape = 4, (4, 9)
  masked = rng.random(shape) < masked_rate
  state = {
    "tokens": rng.integers(0, 3, size=shape).astype(np.int32),
    "drawn": rng.integers(0, 3, size=shape).astype(np.int32),
    "confidence": rng.random(shape).astype(np.float32),
    "probability": np.where(masked, 0, rng.random(shape)).astype(np.float32),
    "masked": masked,
    "commit": masked & (rng.random(shape) < rng.random()),
    "editable": ~masked & (rng.random(shape) < rng.random()),
  }
  commit, replace, remask = (np.asarray(x) for x in edit(strategy, state))
  assert (commit & state["commit"] == state["commit"]).all() and not (commit & ~masked).any()
  assert not ((replace | remask) & ~state["editable"]).any() and not (replace & remask).any()
  falls = commit.sum(axis=1) - remask.sum(axis=1)
  assert (falls[masked.any(axis=1) & state["commit"].any(axis=1)] > 0).all()
  done = ~masked.any(axis=1)
  assert not remask[done].any()  # a block that is written stays written
  if not strategy.extra_steps:
    assert not replace[done].any()
  mine = np.arange(rows)[:, None] == seed % rows
  full = {name: np.where(mine, value, 1).astype(value.dtype) for name, value in state.items()}
  for whole, own in zip((commit, replace, remask), edit(strategy, full), strict=True):
    np.testing.assert_array_equal(own[seed % rows], whole[seed % rows])


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
