"""The objective against an independent transcription, against enumeration, and in its sums."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import LENGTH, MASK, denoise, expected_ce, negative_bound

from lladax.diffusion import (
  Antithetic,
  Band,
  BatchLength,
  BatchLoad,
  Cosine,
  Elbo,
  Linear,
  Objective,
  Polynomial,
  PreviousLoad,
  ResponseLength,
  Stratified,
  SupervisedToken,
  Uniform,
  Unweighted,
  masked_nll,
  nll_from_logits,
)
from lladax.types import Batch

TEXT = (2, 0, 1, 1)
NORMALIZATIONS = [BatchLength(), ResponseLength(), SupervisedToken()]


@functools.partial(jax.jit, static_argnums=0)
def noise(objective, batch, step):
  return objective.noise(batch, 0, step, mask_id=MASK)


@functools.partial(jax.jit, static_argnums=0, static_argnames="share")
def toy_loss(objective, batch, noised, share=1.0):
  return masked_nll(nll_from_logits(denoise), batch, noised, objective=objective, share=share)


def batch_of(tokens, maskable=None) -> Batch:
  tokens = np.asarray(tokens, np.int32)
  ones = np.ones_like(tokens)
  maskable = ones > 0 if maskable is None else np.asarray(maskable, bool)
  return Batch(tokens=tokens, segment_ids=ones, positions=ones, maskable=maskable)


def random_batch(rows: int, seed: int = 0, responses: bool = False) -> Batch:
  rng = np.random.default_rng(seed)
  starts = rng.integers(0, LENGTH, size=(rows, 1)) if responses else np.zeros((rows, 1))
  return batch_of(rng.integers(0, MASK, size=(rows, LENGTH)), np.arange(LENGTH) >= starts)


def numpy_loss(batch: Batch, t: np.ndarray, is_masked: np.ndarray, *, per_response: bool) -> float:
  """LLaDA's published loss, in float64 and loops: CE / p_mask over masked tokens, then divided."""
  total = 0.0
  rows, length = batch.tokens.shape
  logits = np.asarray(denoise(np.where(is_masked, MASK, batch.tokens)), np.float64)
  for row in range(rows):
    p_mask = (1 - 1e-3) * float(t[row]) + 1e-3
    in_row = 0.0
    for i in range(length):
      if is_masked[row, i]:
        exponentials = np.exp(logits[row, i] - logits[row, i].max())
        in_row -= math.log(exponentials[batch.tokens[row, i]] / exponentials.sum()) / p_mask
    total += in_row / (batch.maskable[row].sum() * rows if per_response else rows * length)
  return total


@pytest.mark.quick
@pytest.mark.parametrize("per_response", [False, True])
def test_loss_equals_the_published_one(per_response):
  batch = random_batch(64, responses=per_response)
  normalize = ResponseLength() if per_response else BatchLength()
  objective = Objective(times=Uniform(), normalize=normalize)
  for step in range(3):
    noised = noise(objective, batch, step)
    loss, _, _ = toy_loss(objective, batch, noised)
    expected = numpy_loss(
      batch, np.asarray(noised.t), np.asarray(noised.is_masked), per_response=per_response
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(2.0), Linear(eps=0.05)])
@pytest.mark.parametrize("maskable", [(1, 1, 1, 1), (0, 1, 1, 0)])
def test_expected_elbo_loss_is_the_exact_mean_over_mask_rates(schedule, maskable):
  # E over t of weight(t) * E[ce | t], by the trapezoidal rule over t.
  t = np.linspace(0.0, 1.0, 4001).astype(np.float32)
  rate = np.asarray(schedule.mask_rate(t), np.float64)
  weight = np.asarray(Elbo()(schedule, t), np.float64)
  values = weight * np.array([expected_ce(TEXT, maskable, p) for p in rate])
  by_t = float(np.mean((values[1:] + values[:-1]) / 2))
  # The same mean over the rates that the schedule reaches, [eps, 1], without any schedule.
  rates = np.linspace(schedule.eps, 1.0, 2001)
  per_rate = np.array([expected_ce(TEXT, maskable, p) / p for p in rates])
  by_rate = float(np.mean((per_rate[1:] + per_rate[:-1]) / 2))
  np.testing.assert_allclose(by_t, by_rate, rtol=2e-3)
  # What eps leaves out is of the order of eps.
  exact = negative_bound(TEXT, maskable)
  np.testing.assert_allclose(by_t, exact, rtol=2e-3 + schedule.eps)


@pytest.mark.parametrize("times", [Uniform(), Stratified(), Antithetic()])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_sampled_loss_agrees_with_enumeration_for_every_time_sampler(times, schedule):
  batch = batch_of(np.tile(TEXT, (64, 1)))
  objective = Objective(times=times, schedule=schedule)

  @jax.jit
  @jax.vmap
  def loss(step):
    noised = objective.noise(batch, 1, step, mask_id=MASK)
    return masked_nll(nll_from_logits(denoise), batch, noised, objective=objective)[0] * LENGTH

  losses = np.asarray(loss(jnp.arange(400)), np.float64)
  exact = negative_bound(TEXT, (1, 1, 1, 1))
  error = losses.std() / math.sqrt(len(losses))
  assert error < 0.02 * exact
  assert abs(losses.mean() - exact) < 4 * error + 2 * schedule.eps * exact


@pytest.mark.parametrize("weight", [Elbo(), Unweighted()])
def test_spread_times_have_the_smaller_variance(weight):
  # A network whose loss per token rises with the fraction of the row that is masked, as of text.
  rows, length = 16, 64
  batch = batch_of(np.zeros((rows, length)))

  def token_nll(tokens, targets, weights):
    hidden = jnp.mean(tokens == MASK, axis=1, keepdims=True)
    nll = jnp.where(weights != 0, 0.5 + 4 * hidden, 0.0)
    return jnp.sum(weights * nll), nll, None

  def losses(times):
    objective = Objective(times=times, weight=weight)

    @jax.jit
    @jax.vmap
    def loss(step):
      noised = objective.noise(batch, 0, step, mask_id=MASK)
      return masked_nll(token_nll, batch, noised, objective=objective)[0]

    return np.asarray(loss(jnp.arange(600)), np.float64)

  uniform, stratified, antithetic = map(losses, (Uniform(), Stratified(), Antithetic()))
  # Measured with 2000 steps: 0.096 against 0.022 and 0.016 (Elbo), 0.109 against 0.011 and 0.015.
  assert stratified.var() < uniform.var() / 2.5
  assert antithetic.var() < uniform.var() / 2.5
  np.testing.assert_allclose(stratified.mean(), uniform.mean(), rtol=0.03)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_add_up_to_the_batch(normalize, parts):
  batch = random_batch(16, responses=True)
  objective = Objective(normalize=normalize)
  noised = noise(objective, batch, 0)
  whole_loss, whole, _ = toy_loss(objective, batch, noised)
  losses, sums = [], []
  for part in range(parts):
    rows = slice(part * 16 // parts, (part + 1) * 16 // parts)
    cut = jax.tree.map(lambda x: x[rows], (batch, noised))  # noqa: B023
    loss, part_sums, _ = toy_loss(objective, *cut, share=1 / parts)
    losses.append(loss)
    sums.append(part_sums)
  np.testing.assert_allclose(sum(losses), whole_loss, rtol=1e-6)
  added = sums[0]
  for other in sums[1:]:
    added = added + other
  for name, value in whole.means().items():
    np.testing.assert_allclose(added.means()[name], value, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("maskable", [False, True])
def test_nothing_masked_or_nothing_maskable_costs_nothing(normalize, maskable):
  batch = batch_of(np.zeros((2, LENGTH)), np.full((2, LENGTH), maskable))
  # At the lowest times the mask rate is about 1e-9: nothing is masked.
  objective = Objective(
    schedule=Linear(eps=1e-9), times=Band(0.0, 1e-9, Uniform()), normalize=normalize
  )
  noised = noise(objective, batch, 0)
  assert not np.asarray(noised.is_masked).any()

  def loss(scale):
    token_nll = nll_from_logits(lambda tokens: scale * denoise(tokens))
    return masked_nll(token_nll, batch, noised, objective=objective)

  value, sums, _ = loss(1.0)
  assert value == 0.0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(sums.means()))
  assert jax.grad(lambda scale: loss(scale)[0])(1.0) == 0.0


def test_a_target_of_probability_zero_outside_the_masks_does_not_spoil_the_loss():
  batch = batch_of([[0, 1, 1, 1]], [[False, True, True, True]])
  objective = Objective(times=Band(0.99, 1.0))
  noised = noise(objective, batch, 0)
  token_nll = nll_from_logits(lambda tokens: denoise(tokens).at[..., 0].set(-jnp.inf))
  assert np.isfinite(masked_nll(token_nll, batch, noised, objective=objective)[0])


def test_normalizations_by_hand():
  batch = batch_of([[0] * 4, [0] * 4, [0] * 4], [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
  objective = Objective(times=Band(0.999, 1.0), weight=Unweighted())
  for normalize, expected in [
    (BatchLength(), np.full((3, 4), 1 / 6)),
    (ResponseLength(), np.repeat([[1 / 4], [1 / 8], [0.0]], 4, axis=1)),
    (SupervisedToken(), np.full((3, 4), 1 / 6)),
  ]:
    noised = noise(dataclasses.replace(objective, normalize=normalize), batch, 0)
    np.testing.assert_array_equal(noised.is_masked, batch.maskable)
    np.testing.assert_allclose(noised.weights, np.where(batch.maskable, expected, 0), rtol=1e-6)


def test_metrics_by_time_and_mask_rate():
  rows = 32
  batch = random_batch(rows)
  objective = Objective(weight=Unweighted(), normalize=SupervisedToken())
  noised = noise(objective, batch, 0)
  _, sums, _ = toy_loss(objective, batch, noised)
  means = sums.means()
  masked = np.asarray(noised.is_masked)
  logits = np.asarray(denoise(noised.tokens), np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_probs, np.asarray(batch.tokens)[..., None], -1)[..., 0]
  np.testing.assert_allclose(means["masked_nll"], nll[masked].mean(), rtol=1e-5)
  np.testing.assert_allclose(means["loss"], nll[masked].mean(), rtol=1e-5)
  np.testing.assert_allclose(means["mask_rate"], masked.mean(), rtol=1e-6)
  np.testing.assert_allclose(means["mask_rate_expected"], np.mean(noised.mask_rate), rtol=1e-6)
  np.testing.assert_allclose(means["bits"] * math.log(2), means["nll"], rtol=1e-6)
  bucket = np.minimum((np.asarray(noised.t) * 8).astype(int), 7)
  for b in range(8):
    inside = masked & (bucket == b)[:, None]
    expected = nll[inside].mean() if inside.any() else 0.0
    np.testing.assert_allclose(means["masked_nll_by_t"][b], expected, rtol=1e-5)
    np.testing.assert_allclose(means["mask_rate_by_t"][b], masked[bucket == b].mean(), rtol=1e-6)
    rate = np.asarray(noised.mask_rate, np.float64)[bucket == b]
    np.testing.assert_allclose(means["mask_rate_expected_by_t"][b], rate.mean(), rtol=1e-5)
    np.testing.assert_allclose(
      means["mask_variance_by_t"][b], np.mean(rate * (1 - rate)), rtol=1e-5
    )
    np.testing.assert_allclose(means["rows_by_t"][b], np.mean(bucket == b), rtol=1e-6)
  # `nll` is the bound of the linear schedule whatever is trained.
  bound, _, _ = toy_loss(Objective(), batch, noise(Objective(), batch, 0))
  np.testing.assert_allclose(means["nll"], bound, rtol=1e-5)


class Stats:
  """What a network with two routers returns: losses of a load and of a number of tokens."""

  def balance_loss(self, load_share, tokens):
    load = jnp.ones((2, 3)) / 3 if load_share is None else load_share
    return jnp.array([12.0, 36.0]) * load.max(-1) / tokens

  def z_loss(self, tokens):
    return jnp.array([40.0, 120.0]) / tokens


def test_router_losses_are_added_with_their_coefficients():
  def token_nll(tokens, targets, weights):
    total, nll, _ = nll_from_logits(denoise)(tokens, targets, weights)
    return total, nll, Stats()

  batch, objective = random_batch(4), Objective(balance_loss=0.1, z_loss=0.01)
  noised = noise(objective, batch, 0)
  np.testing.assert_array_equal(noised.batch_tokens, 4 * LENGTH)
  plain, _, _ = toy_loss(objective, batch, noised)

  def routed(load_share=None):
    return masked_nll(
      token_nll, batch, noised, objective=objective, share=0.25, load_share=load_share
    )

  for load_share, balance in (None, 8 / 16), (jnp.float32([[0.5, 0.5, 0], [1, 0, 0]]), 21 / 16):
    loss, sums, _ = routed(load_share)
    np.testing.assert_allclose(loss - plain, 0.1 * balance + 0.01 * 80 / 16, rtol=1e-4)
    np.testing.assert_allclose(sums.sums["balance_loss"], balance, rtol=1e-6)
    np.testing.assert_allclose(sums.sums["z_loss"], 5.0, rtol=1e-6)
    # Four such parts of a batch count as one.
    assert sums.counts["balance_loss"] == sums.counts["loss"] == 0.25


def test_the_load_of_a_balance_loss():
  previous, counted = jnp.float32([[0.2, 0.8]]), jnp.float32([[0.5, 0.5]])
  assert BatchLoad()(previous, lambda: counted) is counted
  assert BatchLoad()(previous, lambda: None) is None
  assert PreviousLoad()(previous, lambda: pytest.fail("counted")) is previous
  assert PreviousLoad()(None, lambda: counted) is counted


def test_a_negative_coefficient_is_an_error():
  with pytest.raises(ValueError, match="balance_loss.*got -1"):
    Objective(balance_loss=-1)
