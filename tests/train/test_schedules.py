"""Laws of the learning-rate schedules."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.train.expert_bias import BiasUpdate
from lladax.train.optimizer import AdamW, Muon, OptimizerConfig, learning_rate, make_optimizer
from lladax.train.schedules import Constant, CosineDecay, Plateaus, Wsd


def factors(schedule, steps):
  factor = schedule.factor(steps)(jnp.arange(steps + 1))
  return np.broadcast_to(np.asarray(factor), steps + 1)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 8), st.floats(0, 1))
def test_wsd_has_three_phases(warmup, decay, stable, final):
  steps = warmup + stable + decay
  got = factors(Wsd(warmup=warmup, decay=decay, final=final), steps)
  expected = [(i + 1) / warmup for i in range(warmup)] + [1.0] * stable
  expected += [1 - (1 - final) * i / decay for i in range(decay)]
  np.testing.assert_allclose(got[:-1], expected, atol=1e-6)
  np.testing.assert_allclose(got[-1], final if decay else 1.0, atol=1e-6)


def test_wsd_takes_a_fraction_of_the_run():
  np.testing.assert_array_equal(
    factors(Wsd(decay_fraction=0.5), 8), factors(Wsd(decay=4, decay_fraction=0.1), 8)
  )


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 5), st.integers(1, 12), st.floats(0, 1))
def test_cosine_falls_from_one_to_final(warmup, falling, final):
  got = factors(CosineDecay(warmup=warmup, final=final), warmup + falling)
  progress = np.arange(falling + 1) / falling
  expected = final + (1 - final) * (1 + np.cos(np.pi * progress)) / 2
  np.testing.assert_allclose(got[warmup:], expected, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 4), st.lists(st.floats(0.05, 1), min_size=1, max_size=4), st.floats(0, 1))
def test_plateaus_follow_each_other_and_the_last_decays(warmup, levels, final):
  steps = 40
  ends = [10 + 7 * i for i in range(len(levels))]
  schedule = Plateaus(
    warmup=warmup,
    levels=tuple(levels),
    ends=tuple(end / steps for end in ends),
    final=final,
  )
  got = factors(schedule, steps)
  expected = [levels[0] * (i + 1) / warmup for i in range(warmup)]
  for level, end in zip(levels, ends, strict=True):
    expected += [level] * (end - len(expected))
  falling = steps - ends[-1]
  expected += [levels[-1] + (final - levels[-1]) * i / falling for i in range(falling + 1)]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_schedule_of_llada_8b():
  # 2.3T tokens in batches of 1280 rows of 4096, arXiv 2502.09992.
  tokens_per_step = 1280 * 4096
  steps = round(2.3e12 / tokens_per_step)
  schedule = Plateaus(warmup=2000, levels=(1.0, 0.25), ends=(1.2 / 2.3, 2.0 / 2.3), final=0.025)
  rate = learning_rate(OptimizerConfig(peak=4e-4, schedule=schedule), steps)
  for tokens, expected in ((0.1e12, 4e-4), (1.19e12, 4e-4), (1.21e12, 1e-4), (1.99e12, 1e-4),
                           (2.15e12, 5.5e-5), (2.3e12, 1e-5)):  # fmt: skip
    assert float(rate(round(tokens / tokens_per_step))) == pytest.approx(expected, rel=1e-3)
  assert float(rate(0)) == pytest.approx(4e-4 / 2000, rel=1e-3)


def test_constant_stays_at_one_after_the_warmup():
  np.testing.assert_allclose(factors(Constant(warmup=2), 5), [0.5, 1, 1, 1, 1, 1])
  config = OptimizerConfig(peak=0.3, schedule=Constant())
  assert float(learning_rate(config, 5)(4)) == pytest.approx(0.3)


@pytest.mark.parametrize(
  "schedule, steps, message",
  [
    (Wsd(warmup=5, decay=6), 10, "10 updates.*warm-up of 5.*decay of 6"),
    (CosineDecay(warmup=10), 10, "10 updates.*warm-up of 10"),
    (Constant(warmup=11), 10, "10 updates.*warm-up of 11"),
    (Plateaus(warmup=5, levels=(1.0, 0.5), ends=(0.5, 1.0)), 10, r"end after \[5, 10\].*of 5"),
    (Plateaus(levels=(1.0, 0.5), ends=(0.5, 0.51)), 10, r"end after \[5, 5\]"),
  ],
)
def test_phases_that_do_not_fit_are_refused(schedule, steps, message):
  with pytest.raises(ValueError, match=message):
    make_optimizer(OptimizerConfig(schedule=schedule), steps)


@pytest.mark.parametrize(
  "make",
  [
    lambda: Wsd(warmup=-1),
    lambda: Wsd(decay_fraction=1.5),
    lambda: CosineDecay(final=2.0),
    lambda: AdamW(b2=1.0),
    lambda: Muon(beta=1.0),
    lambda: Muon(ns_steps=-1),
    lambda: OptimizerConfig(peak=float("nan")),
    lambda: OptimizerConfig(clip=0.0),
    lambda: OptimizerConfig(ema=1.0),
    lambda: BiasUpdate(rate=-1),
    lambda: Plateaus(levels=(1.0, 1.5), ends=(0.5, 1.0)),
    lambda: Plateaus(levels=(1.0,), ends=(0.5, 1.0)),
    lambda: Plateaus(levels=(1.0, 0.5), ends=(0.5, 0.5)),
  ],
)
def test_bad_constants_are_refused_with_their_value(make):
  with pytest.raises(ValueError, match=r"got .*(-1|1\.5|2\.0|1\.0|nan|0\.0|0\.5)"):
    make()
