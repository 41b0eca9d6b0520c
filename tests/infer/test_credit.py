"""Credit against a transcription of dInfer's, in NumPy, over the iterations of a block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.infer import Credit

ROWS, WIDTH, VOCABULARY = 3, 6, 10


@functools.partial(jax.jit, static_argnums=0)
def credit(rule, state, logits, masked):
  return rule(state, logits, masked)


def iterations(count, seed=0):
  """Logits of similar taste and ever fewer masks, as a block has them."""
  rng = np.random.default_rng(seed)
  taste = rng.normal(size=(ROWS, WIDTH, VOCABULARY)) * 2
  order = rng.random((ROWS, WIDTH))
  for i in range(count):
    logits = (taste + rng.normal(size=taste.shape)).astype(np.float32)
    yield logits, order >= i / count


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.quick
@pytest.mark.parametrize("rule", [Credit(), Credit(0.65, 0.2, 0.7), Credit.adaptive()])
def test_credit_is_that_of_the_published_code(rule):
  state = rule.init(ROWS, WIDTH, VOCABULARY)
  matrix = np.zeros((ROWS, WIDTH, VOCABULARY))
  for number, (logits, masked) in enumerate(iterations(5)):
    fused, state = credit(rule, state, logits, masked)
    for row in range(ROWS):
      ratio = masked[row].mean()
      adaptive = rule.alpha is None
      alpha, gamma, beta = (
        (1 - ratio, 1.0, 1 - ratio) if adaptive else (rule.alpha, rule.gamma, rule.beta)
      )
      if number > 0:
        matrix[row] *= beta
      probability = softmax(logits[row].astype(np.float64))
      for place in range(WIDTH):
        if masked[row, place]:
          top = probability[place].argmax()
          matrix[row, place, top] += probability[place, top] ** gamma
      expected = logits[row] + alpha * np.log(matrix[row] + 1)
      np.testing.assert_allclose(fused[row], expected, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(state, matrix, rtol=2e-5, atol=1e-6)


def test_an_opinion_held_for_long_outweighs_a_passing_one():
  rule = Credit(alpha=2.0, gamma=1.0, beta=0.9)
  state = rule.init(1, 1, 3)
  masked = jnp.ones((1, 1), bool)
  for _ in range(4):
    fused, state = rule(state, jnp.array([[[1.0, 0.0, 0.0]]]), masked)
  fused, _ = rule(state, jnp.array([[[1.0, 1.3, 0.0]]]), masked)
  assert int(jnp.argmax(fused)) == 0


def test_a_row_is_a_function_of_itself_and_written_positions_gain_nothing():
  rule = Credit()
  state = rule.init(ROWS, WIDTH, VOCABULARY)
  for logits, masked in iterations(3, seed=1):
    fused, new = credit(rule, state, logits, masked)
    alone, own = credit(rule, state[1:2], logits[1:2], masked[1:2])
    np.testing.assert_array_equal(alone, fused[1:2])
    np.testing.assert_array_equal(own, new[1:2])
    gained = (np.asarray(new) != np.asarray(rule.beta * state)).any(axis=-1)
    np.testing.assert_array_equal(gained, masked)
    state = new


def test_ids_that_are_removed_stay_removed():
  logits = jnp.array([[[0.0, 1.0, -jnp.inf]]])
  fused, state = Credit()(Credit().init(1, 1, 3), logits, jnp.ones((1, 1), bool))
  assert fused[0, 0, 2] == -jnp.inf and jnp.isfinite(state).all()


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"alpha": -0.1}, "alpha of Credit is a finite number of at least 0; got -0.1"),
    ({"gamma": float("inf")}, "gamma of Credit.*inf"),
    ({"beta": 1.2}, "beta of Credit lies between 0 and 1; got 1.2"),
  ],
)
def test_numbers_that_do_not_fit_are_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    Credit(**fields)


def test_it_is_a_value():
  assert hash(Credit()) == hash(Credit()) and eval(repr(Credit.adaptive())) == Credit.adaptive()
