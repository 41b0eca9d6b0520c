"""The rules of dInfer, Fast-dLLM, LLaDA2 and Dream against NumPy transcriptions of their code."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import published_rules as published
import pytest

from lladax.infer import (
  EditTokens,
  Entropy,
  Factor,
  Hierarchical,
  LinearTime,
  LowConfidence,
  Margin,
  RemaskLow,
  Threshold,
  ThresholdOrBudget,
)
from lladax.infer.unmasking import token_probability

ROWS, WIDTH, VOCABULARY = 16, 12, 7
KEYS = jax.vmap(jax.random.key)(np.arange(ROWS))


@functools.partial(jax.jit, static_argnums=0)
def commit(rule, confidence, masked, budget, iteration):
  return rule(confidence, masked, budget, KEYS, iteration)


def run(rule, confidence, masked, budget=None, iteration=None):
  none = np.zeros(ROWS, np.int32)
  budget, iteration = (none if x is None else x for x in (budget, iteration))
  return np.asarray(commit(rule, confidence, masked, budget, iteration))


@jax.jit
def read(logits):
  drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return drawn, token_probability(logits, drawn)


def windows(seed, masked_rate=None):
  """Random (drawn, confidence, masked, rng): rows from hesitant to sure, some confidences equal."""
  rng = np.random.default_rng(seed)
  scale = rng.choice([0.5, 2.0, 6.0], size=(ROWS, 1, 1))
  logits = (rng.normal(size=(ROWS, WIDTH, VOCABULARY)) * scale).astype(np.float32)
  logits[:, 1] = logits[:, 8]  # positions that say the same
  rate = rng.random((ROWS, 1)) if masked_rate is None else masked_rate
  masked = rng.random((ROWS, WIDTH)) < rate
  drawn, confidence = (np.array(x) for x in read(logits))
  return drawn, confidence, masked, rng


many = hypothesis.settings(max_examples=25, deadline=None)
seeds = hypothesis.given(seed=st.integers(0, 2**31))


@pytest.mark.quick
@many
@seeds
@pytest.mark.parametrize("threshold", [0.9, 0.6])
def test_threshold_is_that_of_dinfer(seed, threshold):
  _, confidence, masked, _ = windows(seed)
  confidence[:, 2] = confidence.max(axis=1) - np.float32(5e-6)  # within the slack of the best
  confidence[:, 3] = confidence.max(axis=1) - np.float32(2e-5)  # and not
  chosen = run(Threshold(threshold), confidence, masked)
  for row in range(ROWS):
    expected = published.dinfer_threshold(confidence[row], masked[row], threshold)
    if masked[row].any():
      np.testing.assert_array_equal(chosen[row], expected)


@many
@seeds
def test_threshold_falls_with_the_iterations_of_the_row_as_in_dinfer(seed):
  _, confidence, masked, rng = windows(seed, masked_rate=0.7)
  iteration = rng.integers(0, 20, size=ROWS).astype(np.int32)
  flat = run(Threshold(0.8, start=1.0), confidence, masked, iteration=iteration)
  deep = run(Hierarchical(0.8, 0.5, start=1.0), confidence, masked, iteration=iteration)
  for row in np.flatnonzero(masked.any(axis=1)):
    threshold = max(1 - 0.02 * iteration[row], 0.8)
    args = confidence[row], masked[row], threshold
    np.testing.assert_array_equal(flat[row], published.dinfer_threshold(*args))
    np.testing.assert_array_equal(deep[row], published.dinfer_hierarchical(*args, 0.5))


@many
@seeds
@pytest.mark.parametrize("threshold,low_threshold", [(0.8, 0.5), (0.92, 0.62), (0.9, 0.2)])
def test_hierarchical_is_that_of_dinfer(seed, threshold, low_threshold):
  _, confidence, masked, _ = windows(seed)
  chosen = run(Hierarchical(threshold, low_threshold), confidence, masked)
  for row in range(ROWS):
    args = confidence[row], masked[row], threshold, low_threshold
    np.testing.assert_array_equal(chosen[row], published.dinfer_hierarchical(*args))


def remasked(rule, drawn, confidence, masked, editable, chosen):
  tokens = np.full((ROWS, WIDTH), VOCABULARY, np.int32)
  state = {"tokens": tokens, "drawn": drawn, "confidence": confidence, "probability": confidence}
  edit = jax.jit(lambda state: rule(**state))
  state |= {"masked": masked, "commit": chosen, "editable": editable}
  return [np.asarray(x) for x in edit(state)]


def test_remasking_is_that_of_dinfer_where_doubts_do_not_touch_masks():
  """dInfer joins runs over tokens in doubt; the rule here has chosen before doubts are known."""
  compared = with_doubts = 0
  for seed in range(12):
    drawn, confidence, masked, rng = windows(seed, masked_rate=0.3)
    touches = masked | np.roll(masked, 1, axis=1) | np.roll(masked, -1, axis=1)
    written = ~masked & (rng.random(masked.shape) < 0.8)
    written &= ~(touches & (confidence < 0.4))
    chosen = run(Hierarchical(0.8, 0.5), confidence, masked)
    to_write, replace, remask = remasked(RemaskLow(0.4), drawn, confidence, masked, written, chosen)
    for row in np.flatnonzero(masked.any(axis=1)):
      args = confidence[row], masked[row], written[row]
      writes, masks = published.dinfer_remask(*args, 0.8, 0.5, 0.4)
      np.testing.assert_array_equal(to_write[row] | replace[row], writes)
      np.testing.assert_array_equal(remask[row], masks)
      compared, with_doubts = compared + 1, with_doubts + masks.any()
  assert compared > 100 and with_doubts > 30


@many
@seeds
@pytest.mark.parametrize("threshold", [0.9, 0.5])
def test_threshold_without_slack_is_that_of_fast_dllm(seed, threshold):
  _, confidence, masked, _ = windows(seed)
  chosen = run(Threshold(threshold, slack=0.0), confidence, masked)
  for row in range(ROWS):
    expected = published.fast_dllm_threshold(confidence[row], masked[row], threshold)
    np.testing.assert_array_equal(chosen[row], expected)


@many
@seeds
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_factor_is_that_of_fast_dllm_but_for_the_last_position(seed, factor):
  """Its loop ends at the same index whether the last position fails or none; it is written then."""
  _, confidence, masked, _ = windows(seed)
  chosen = run(Factor(factor), confidence, masked)
  for row in range(ROWS):
    expected = published.fast_dllm_factor(confidence[row], masked[row], factor)
    if chosen[row].sum() == masked[row].sum() - 1 and expected.sum() == masked[row].sum():
      last = np.where(masked[row], confidence[row], np.inf).min()
      assert last < 1 - factor / (masked[row].sum() + 1)
    else:
      np.testing.assert_array_equal(chosen[row], expected)


@many
@seeds
def test_the_fallback_of_llada2_is_the_budget(seed):
  _, confidence, masked, rng = windows(seed)
  budget = rng.integers(0, 5, size=ROWS).astype(np.int32)
  chosen = run(ThresholdOrBudget(0.8), confidence, masked, budget)
  for row in range(ROWS):
    args = confidence[row], masked[row], 0.8
    expected = published.llada2_threshold(*args, max(budget[row], 1))
    np.testing.assert_array_equal(chosen[row], expected)


def test_editing_is_that_of_llada21():
  edited = 0
  for seed in range(8):
    drawn, confidence, masked, rng = windows(seed)
    given = ~masked & (rng.random(masked.shape) < 0.3)
    tokens = np.where(rng.random(masked.shape) < 0.5, drawn, 0)
    state = {"tokens": tokens, "drawn": drawn, "confidence": confidence, "probability": confidence}
    chosen = run(ThresholdOrBudget(0.95), confidence, masked)
    to_write, replace, remask = EditTokens(0.9)(
      **state, masked=masked, commit=chosen, editable=~masked & ~given
    )
    np.testing.assert_array_equal(to_write, chosen)
    assert not remask.any()
    for row in range(ROWS):
      args = confidence[row], drawn[row], tokens[row], masked[row], given[row]
      expected = published.llada2_edit(*args, 0.9)
      np.testing.assert_array_equal(replace[row], expected)
      edited += expected.sum()
  assert edited > 20


def dream_network(tokens):
  """Some function of a row: logits float32[W, V]; the last id is MASK and never likely."""
  weights = np.random.default_rng(5).normal(size=(WIDTH, VOCABULARY, WIDTH, VOCABULARY))
  logits = weights[:, :, np.arange(WIDTH), tokens].sum(-1).astype(np.float32)
  logits[:, -1] = -np.inf
  return logits


@pytest.mark.parametrize(
  "rule,kind",
  [(LowConfidence(), "maskgit_plus"), (Margin(), "topk_margin"), (Entropy(), "entropy")],
)
@pytest.mark.parametrize("steps", [4, 9])
def test_a_block_is_written_as_dream_writes_it(rule, kind, steps):
  mask = VOCABULARY - 1
  tokens = np.full(WIDTH, mask)
  tokens[[0, 5]] = 2
  expected = published.dream_generate(dream_network, tokens, mask, steps=steps, kind=kind)
  schedule = LinearTime()
  at_start = jnp.array([WIDTH - 2])

  @jax.jit
  def iterate(logits, masked, iteration):
    drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)[None]
    left = jnp.sum(masked, dtype=jnp.int32)[None]
    budget = schedule(at_start, left, iteration, steps)
    score = rule.score(logits[None], drawn)
    return drawn[0], rule(score, masked[None], budget, KEYS[:1], iteration[None])[0]

  for i in range(steps):
    drawn, chosen = iterate(dream_network(tokens), tokens == mask, jnp.int32(i))
    tokens = np.where(chosen, drawn, tokens)
    np.testing.assert_array_equal(tokens, expected[i + 1])
  assert (tokens != mask).all()


@pytest.mark.parametrize("steps", [1, 4, 37, 256, 512])
def test_the_steps_are_those_of_dream(steps):
  times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
  left = np.array([1, 3, 50, 256, 700], np.int32)
  iterations = np.arange(steps, dtype=np.int32)
  budget = jax.jit(jax.vmap(lambda i: LinearTime()(left, left, i, steps)))(iterations)
  share = (1 - times[1:] / times[:-1])[:, None]
  expected = np.where(iterations[:, None] < steps - 1, np.floor(left * share), left)
  exact = left * share
  clear = np.abs(exact - np.round(exact)) > 1e-4 * np.maximum(exact, 1)  # of a rounding either way
  clear |= iterations[:, None] == steps - 1
  np.testing.assert_array_equal(np.floor(budget)[clear], expected[clear])
  assert clear.mean() > 0.9
