"""Laws of the learning-rate schedules and of the optimizer's mask."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.train.optimizer import (
  Constant,
  CosineDecay,
  OptimizerConfig,
  Wsd,
  decay_mask,
  learning_rate,
  make_optimizer,
)


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
    lambda: OptimizerConfig(b2=1.0),
    lambda: OptimizerConfig(peak=float("nan")),
    lambda: OptimizerConfig(clip=0.0),
  ],
)
def test_bad_constants_are_refused_with_their_value(make):
  with pytest.raises(ValueError, match="got (-1|1.5|2.0|1.0|nan|0.0)"):
    make()


PARAMS = {
  "layers": {
    "norm": {"scale": jnp.ones((3, 4))},
    "mlp": {"kernel": jnp.ones((3, 4, 4))},
    "moe": {"expert_bias": jnp.ones((3, 4))},
  },
  "head": {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))},
}


def test_norms_and_biases_do_not_decay_even_when_scanned():
  mask = decay_mask(PARAMS)
  assert mask == {
    "layers": {
      "norm": {"scale": False},
      "mlp": {"kernel": True},
      "moe": {"expert_bias": False},
    },
    "head": {"bias": False, "kernel": True},
  }
  boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), PARAMS)
  assert jax.tree.leaves(decay_mask(boxed)) == jax.tree.leaves(mask)


def test_the_decay_reaches_the_update():
  config = OptimizerConfig(peak=0.1, schedule=Constant(), weight_decay=0.5)
  optimizer = make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates["head"]["kernel"], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0.0)


def test_clipping_makes_the_update_blind_to_the_size_of_the_gradient():
  # eps far above the clipped moments, so that the update is proportional to the gradient.
  config = OptimizerConfig(peak=1.0, schedule=Constant(), weight_decay=0.0, eps=1e3, clip=1.0)
  optimizer = make_optimizer(config, 10)

  def update(scale):
    grads = jax.tree.map(lambda x: scale * x, PARAMS)
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]["head"]["kernel"]

  np.testing.assert_allclose(update(100.0), update(1.0), rtol=1e-4)
  assert np.abs(update(1e-3)).max() < 0.1 * np.abs(update(1.0)).max()
