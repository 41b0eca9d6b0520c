"""The likelihood bound against exact enumeration on a toy vocabulary, and its invariances."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
  LENGTH,
  MASK,
  denoise,
  masked_ce,
  maskings,
  negative_bound,
  order_log_probs,
)

from lladax.diffusion import log_likelihood_bound, nll_from_logits, repeat_rows
from lladax.diffusion.likelihood import even_counts, mask_exactly
from lladax.types import Batch

MASKABLES = [(1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0)]


def batch_of(tokens, maskable) -> Batch:
  tokens = np.asarray(tokens, np.int32)
  ones = np.ones_like(tokens)
  return Batch(tokens=tokens, segment_ids=ones, positions=ones, maskable=np.asarray(maskable, bool))


def bound(batch, **options):
  options = {"seed": 0, "mask_id": MASK} | options
  call = jax.jit(lambda batch: log_likelihood_bound(nll_from_logits(denoise), batch, **options))
  return np.asarray(call(batch), np.float64)


@pytest.mark.parametrize("maskable", MASKABLES)
def test_three_exact_forms_of_the_bound_agree(maskable):
  text = (2, 0, 1, 1)
  m = sum(maskable)
  # The estimator averaged over all counts and all sets of that many positions ...
  by_count = np.mean(
    [
      m / n * np.mean([masked_ce(text, s) for s in maskings(maskable) if sum(s) == n])
      for n in range(1, m + 1)
    ]
  )
  # ... is the integral over mask rates, and the mean over orders of writing token by token.
  np.testing.assert_allclose(by_count, negative_bound(text, maskable), rtol=1e-12)
  np.testing.assert_allclose(-order_log_probs(text, maskable).mean(), by_count, rtol=1e-12)


def test_it_is_a_lower_bound_on_a_normalised_likelihood():
  # The mixture over orders is a distribution over texts (MASK included as a symbol here).
  total = 0.0
  for text in itertools.product(range(MASK), repeat=LENGTH):
    log_probs = order_log_probs(text, (1,) * LENGTH)
    likelihood = np.exp(log_probs).mean()
    assert math.log(likelihood) >= -negative_bound(text, (1,) * LENGTH)
    total += likelihood
  assert 0.0 < total < 1.0


@pytest.mark.quick
@pytest.mark.parametrize("mc_num", [1, 6])
def test_estimate_agrees_with_enumeration(mc_num):
  rows, text = 2000, (2, 0, 1, 1)
  estimates = bound(
    batch_of(np.tile(text, (4 * rows, 1)), np.repeat(MASKABLES, rows, axis=0)), mc_num=mc_num
  )
  for maskable, of_maskable in zip(MASKABLES, estimates.reshape(4, rows), strict=True):
    exact = -negative_bound(text, maskable)
    error = of_maskable.std() / math.sqrt(rows)
    assert abs(of_maskable.mean() - exact) <= 4.5 * error + 1e-5
    assert error < 0.02 * abs(exact)


@pytest.mark.parametrize("mc_num", [1, 2, 3, 5, 8, 128])
def test_each_count_is_uniform_and_together_they_are_even(mc_num):
  pairs = np.array([(start, m) for m in range(1, 8) for start in range(m)])
  counts = np.asarray(even_counts(*pairs.T, np.arange(mc_num), mc_num=mc_num))  # [samples, pairs]
  for m in range(1, 8):
    of_m = counts[:, pairs[:, 1] == m]
    for sample in of_m:  # over all starts every count occurs once
      assert sorted(sample) == list(range(1, m + 1))
    for of_start in of_m.T:  # from one start no count is more than one ahead of another
      occurrences = np.bincount(of_start, minlength=m + 1)[1:]
      assert occurrences.max() - occurrences.min() <= 1


def test_sets_have_the_exact_size_and_are_equally_likely():
  rows = 6000
  maskable = np.tile([True, False, True, True, True, False], (rows, 1))
  keys = jax.vmap(jax.random.key)(np.arange(rows))
  masked = np.asarray(mask_exactly(keys, maskable, jnp.full(rows, 2)))
  assert (masked.sum(axis=1) == 2).all() and not (masked & ~maskable).any()
  _, counts = np.unique(masked, axis=0, return_counts=True)
  assert len(counts) == 6  # 4 choose 2
  chi_square = ((counts - rows / 6) ** 2 / (rows / 6)).sum()
  assert chi_square < 20.5  # the 0.999 quantile with 5 degrees of freedom


def test_exact_counts_have_less_variance_than_independent_masks():
  # E over t of CE / t with independent masks, against exact counts, with equal numbers of samples.
  rows, mc_num, text = 1500, 8, (2, 0, 1, 1)
  ones = np.ones((rows, LENGTH))
  exact_counts = bound(batch_of(np.tile(text, (rows, 1)), ones), mc_num=mc_num)
  rng = np.random.default_rng(0)
  t = rng.uniform(1e-3, 1.0, size=(rows, mc_num))
  sets = rng.uniform(size=(rows, mc_num, LENGTH)) < t[..., None]
  table = {s: masked_ce(text, s) for s in maskings((1,) * LENGTH)}
  ce = np.array([[table[tuple(s)] for s in row] for row in sets.tolist()])
  independent = -(ce / t).mean(axis=1)
  # Measured: 0.19 of it.
  assert exact_counts.var() < independent.var() / 3


def test_a_single_token_is_exact_with_one_sample():
  text, maskable = (2, 0, 1, 1), (0, 0, 1, 0)
  estimate = bound(batch_of([text], [maskable]), mc_num=1)
  np.testing.assert_allclose(estimate, [-masked_ce(text, maskable)], rtol=1e-6)


def test_rows_are_independent_of_their_batch_and_of_how_samples_are_grouped():
  tokens = np.random.default_rng(0).integers(0, MASK, size=(5, LENGTH))
  maskable = np.array([(1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1), (1, 1, 0, 1)])
  whole = bound(batch_of(tokens, maskable), mc_num=12)
  assert whole[1] == 0.0  # nothing to score
  assert (whole[[0, 2, 3, 4]] < 0).all()
  for mc_batch in (3, 12):
    np.testing.assert_allclose(
      bound(batch_of(tokens, maskable), mc_num=12, mc_batch=mc_batch), whole, rtol=1e-5
    )
  rows = np.array([4, 2])
  part = bound(batch_of(tokens[rows], maskable[rows]), mc_num=12, row_ids=rows)
  np.testing.assert_allclose(part, whole[rows], rtol=1e-6)
  assert (bound(batch_of(tokens, maskable), mc_num=12, seed=1)[[0, 4]] != whole[[0, 4]]).all()


def test_the_network_sees_rows_in_the_order_of_repeat_rows():
  batch = batch_of([[0, 0, 0, 0], [1, 1, 1, 1]], np.ones((2, LENGTH)))
  bound_batch = repeat_rows(batch, 3)
  seen = []

  def token_nll(tokens, targets, weights):
    seen.append(tokens.shape)
    # A network bound to its rows: fails to find its targets if the order were another.
    nll = jnp.where(targets == bound_batch.tokens, 1.0, jnp.nan) * (weights != 0)
    return jnp.sum(nll * weights), nll, None

  result = log_likelihood_bound(token_nll, batch, seed=0, mask_id=MASK, mc_num=6, mc_batch=3)
  assert set(seen) == {(6, LENGTH)}
  # Every masked token costs 1 and counts M / n, n at a time: M in all.
  np.testing.assert_allclose(result, [-4.0, -4.0], rtol=1e-6)


@pytest.mark.parametrize("mc_num,mc_batch", [(0, 1), (8, 3), (4, 8), (4, 0)])
def test_samples_that_do_not_divide_are_an_error(mc_num, mc_batch):
  with pytest.raises(ValueError, match=f"mc_num={mc_num}, mc_batch={mc_batch}"):
    bound(batch_of([[0] * 4], [[1] * 4]), mc_num=mc_num, mc_batch=mc_batch)
