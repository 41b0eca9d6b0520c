"""The watch is silent over right noise, at the rate it promises, and hears what is wrong."""

from __future__ import annotations

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.diffusion import Antithetic, Band, Cosine, Linear, Objective, Stratified, Uniform
from lladax.diffusion.objective import loss_sums
from lladax.train.noise_watch import KINDS, NoiseDrift, NoiseWatch, deviations, excess
from lladax.types import Batch, Sums

B, L, STEPS, MASK = 16, 256, 400, 1


def batch() -> Batch:
  segments = (np.arange(L) < L - 8 * np.arange(B)[:, None]).astype(np.int32)  # padding
  tokens = np.full((B, L), 2, np.int32)
  return Batch(tokens=tokens, segment_ids=segments, positions=tokens, maskable=segments > 0)


def bfloat16_draws(noised, step):
  draws = jax.random.uniform(jax.random.key(step), (B, L), jnp.bfloat16)
  return noised.replace(is_masked=(draws < noised.mask_rate[:, None]) & batch().maskable)


def another_schedule(noised, step):
  """A cosine's rates where the objective says linear, for the same times."""
  draws = jax.random.uniform(jax.random.key(step), (B, L))
  rate = Cosine().mask_rate(noised.t)
  # Whoever makes the noise believes in it.
  return noised.replace(is_masked=(draws < rate[:, None]) & batch().maskable, mask_rate=rate)


def times_that_are_not_uniform(noised, step):
  """t^1.2: consistent with its own rates, only drawn wrongly."""
  t = noised.t**1.2
  rate = Linear().mask_rate(t)
  draws = jax.random.uniform(jax.random.key(step), (B, L))
  return noised.replace(t=t, mask_rate=rate, is_masked=(draws < rate[:, None]) & batch().maskable)


@functools.cache
def steps(times, spoil=None, same_key=False) -> list[Sums]:
  """The sums of every step, as a train step returns them."""
  objective = Objective(times=times)

  @jax.jit
  @jax.vmap
  def sums(step):
    noised = objective.noise(batch(), 0, jnp.where(same_key, 0, step), mask_id=MASK)
    noised = noised if spoil is None else spoil(noised, step)
    return loss_sums(jnp.ones((B, L)), batch(), noised, schedule=objective.schedule)

  stacked = jax.device_get(sums(jnp.arange(STEPS)))
  return [jax.tree.map(lambda x: x[step], stacked) for step in range(STEPS)]  # noqa: B023


def watch(all_steps, times=Stratified(), **options) -> NoiseWatch:  # noqa: B008
  noise = NoiseWatch(times, every=20, on_drift="stop", **options)
  for step, sums in enumerate(all_steps, start=1):
    noise(step, sums, None)
  return noise


@pytest.mark.parametrize(
  "times", [Stratified(), Uniform(), Antithetic(), Band(0.3, 0.8), Band(0.1, 0.9, Uniform())],
  ids=repr,
)  # fmt: skip
def test_right_noise_is_right(times):
  noise = watch(steps(times), times)
  z = [deviations(value) for value in noise._sums.values()]
  assert np.nanmax(np.abs(z)) < 4.5
  assert np.nanmax(np.abs(z)) > 0.05  # something was counted


@pytest.mark.parametrize(
  "spoil, same_key, message",
  [
    (bfloat16_draws, False, r"t in \[0, 1\) 0.5\d+ of tokens masked, 0.5\d+ expected"),
    (another_schedule, False, "of tokens masked"),
    (times_that_are_not_uniform, False, "of rows drawn"),
    (None, True, "of tokens masked"),
  ],
  ids=["bfloat16", "schedule", "times", "key"],
)
def test_wrong_noise_stops_the_run(spoil, same_key, message):
  with pytest.raises(NoiseDrift, match=message):
    watch(steps(Stratified(), spoil, same_key))


def test_a_warning_goes_on_and_is_written(caplog):
  written = []
  all_steps = steps(Stratified(), another_schedule)
  noise = NoiseWatch(Stratified(), every=20, write=lambda step, values: written.append(values))
  with caplog.at_level(logging.ERROR):
    for step, sums in enumerate(all_steps[:60], start=1):
      noise(step, sums, None)
  assert len(caplog.records) == 3 and "step 60: the noise is not that" in caplog.text
  assert [values["noise_alarm"] for values in written] == [1, 1, 1]
  assert np.shape(written[0]["noise_z_by_t"]) == np.shape(written[0]["times_z_by_t"]) == (8,)
  assert np.abs(written[0]["noise_z_by_t"]).max() > 10


def test_a_late_drift_is_heard_in_the_latest_stretch():
  noise = NoiseWatch(Stratified(), every=20, recent=5, on_drift="stop")
  right = steps(Stratified())
  for step, sums in enumerate(right[:300], start=1):
    noise(step, sums, None)
  for kind in KINDS:  # a million steps that were right on average
    count, mean, variance, of = 3000 * noise._sums[f"{kind} all"]
    noise._sums[f"{kind} all"] = np.array([mean, mean, variance, of])
  with pytest.raises(NoiseDrift) as caught:
    for step, sums in enumerate(steps(Stratified(), another_schedule), start=301):
      noise(step, sums, None)
  assert "(recent steps up to 320)" in str(caught.value)
  assert "(all steps" not in str(caught.value)


def test_a_restart_counts_on():
  all_steps = steps(Stratified())
  whole = watch(all_steps)
  first = watch(all_steps[:150])
  second = NoiseWatch(Stratified(), every=20, on_drift="stop")
  second.set_state(json.loads(json.dumps(first.get_state())))
  for step, sums in enumerate(all_steps[150:], start=151):
    second(step, sums, None)
  assert second.get_state() == whole.get_state()


def test_skipped_steps_count_nothing():
  noise = NoiseWatch(Stratified(), every=1, on_drift="stop")
  nothing = jax.tree.map(np.zeros_like, steps(Stratified())[0])
  for step in range(1, 4):
    noise(step, nothing, None)
  assert not any(value.any() for value in noise._sums.values())


def test_false_alarms_are_as_rare_as_promised():
  """2000 runs of 100 looks, in draws of the numbers themselves: small counts and large ones."""
  rng, probability, runs, looks = np.random.default_rng(0), 0.2, 2000, 100
  rate = np.array([0.003, 0.06, 0.3, 0.9])
  for tokens in (3, 4000):
    alarms = np.zeros(runs, bool)
    count = np.zeros((runs, rate.size))
    for look in range(1, looks + 1):
      count += rng.binomial(tokens, rate, (runs, rate.size))
      of = np.full_like(count, look * tokens)
      sums = np.array([count, of * rate, of * rate * (1 - rate), of])
      part = probability * 6 / (np.pi * look) ** 2 / rate.size
      alarms |= (excess(sums, part) > 0).any(1)
    # A promise, not an estimate: the bound holds for any counts, and is wide for small ones.
    assert alarms.mean() <= probability
    # It is not empty either: three more standard deviations than it allows are heard.
    large = sums.copy()
    large[0] = large[1] + np.sqrt(2 * large[2] * np.log(2 / part)) + np.log(2 / part)
    assert (excess(large, part) > 0).all()


@pytest.mark.parametrize("times", [Stratified(), Antithetic(), Uniform(), Band(), Band(0, 0.5)])
def test_samplers_know_their_distribution(times):
  draws = np.concatenate([times(jax.random.key(seed), 64) for seed in range(100)])
  for t in (0.0, 0.1, 0.35, 0.5, 0.77, 1.0):
    assert times.cdf(t) == pytest.approx((draws <= t).mean(), abs=0.03)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(every=0), "got 0"),
    (dict(false_alarm=1.5), "got 1.5"),
    (dict(on_drift="panic"), "'warn' or 'stop'; got 'panic'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    NoiseWatch(Stratified(), **options)
