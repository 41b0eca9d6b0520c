"""The forward process: where noise falls, and that it depends on nothing but its indices."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.diffusion import (
  Antithetic,
  Band,
  Linear,
  Objective,
  Stratified,
  Uniform,
  mask_tokens,
  noise_keys,
)
from lladax.diffusion.forward import time_key
from lladax.sharding import batch_sharding, make_mesh
from lladax.types import Batch

MASK = 99


def text_batch(rows: int, length: int = 16, maskable=None) -> Batch:
  tokens = np.arange(rows * length, dtype=np.int32).reshape(rows, length) % 50
  ones = np.ones_like(tokens)
  maskable = ones > 0 if maskable is None else np.asarray(maskable)
  return Batch(tokens=tokens, segment_ids=ones, positions=ones, maskable=maskable)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31 - 1), pattern=st.integers(0, 2**32 - 1))
def test_noise_falls_on_maskable_tokens_only_and_leaves_the_rest(seed, pattern):
  maskable = np.array([bool(pattern >> i & 1) for i in range(32)]).reshape(2, 16)
  batch = text_batch(2, maskable=maskable)
  keys = noise_keys(seed, 0, jnp.arange(2))
  noised = mask_tokens(batch, jnp.array([0.9, 1.0]), keys, schedule=Linear(), mask_id=MASK)
  masked = np.asarray(noised.is_masked)
  assert not (masked & ~maskable).any()
  np.testing.assert_array_equal(noised.tokens, np.where(masked, MASK, batch.tokens))
  np.testing.assert_array_equal(masked[1], maskable[1])  # the mask rate at t = 1 is 1


def test_realised_mask_rate_is_the_schedules():
  rows, length = 64, 512
  batch = text_batch(rows, length)
  t = jnp.linspace(0.0, 1.0, rows)
  keys = noise_keys(3, 0, jnp.arange(rows))
  noised = mask_tokens(batch, t, keys, schedule=Linear(), mask_id=MASK)
  rate = np.asarray(noised.mask_rate, np.float64)
  error = np.asarray(noised.is_masked).mean(axis=1) - rate
  deviation = np.sqrt(rate * (1 - rate) / length)
  assert np.all(np.abs(error) <= 4.5 * deviation)
  assert abs(error.mean()) < 4 * np.sqrt((deviation**2).sum()) / rows


@pytest.mark.quick
@pytest.mark.parametrize("times", [Uniform(), Antithetic()])
def test_the_noise_of_a_row_does_not_depend_on_the_size_of_the_batch(times):
  objective = Objective(times=times)
  large = objective.noise(text_batch(8), 5, 17, mask_id=MASK)
  small = objective.noise(text_batch(3), 5, 17, mask_id=MASK)
  np.testing.assert_array_equal(large.t[:3], small.t)
  np.testing.assert_array_equal(large.tokens[:3], small.tokens)


def test_masks_of_any_subset_of_rows_are_those_of_the_whole():
  batch = text_batch(8)
  rows = np.array([6, 1])
  t = jnp.full(8, 0.5)
  whole = mask_tokens(batch, t, noise_keys(1, 2, jnp.arange(8)), schedule=Linear(), mask_id=MASK)
  part = mask_tokens(
    jax.tree.map(lambda x: x[rows], batch),
    t[rows],
    noise_keys(1, 2, rows),
    schedule=Linear(),
    mask_id=MASK,
  )
  np.testing.assert_array_equal(whole.tokens[rows], part.tokens)


@pytest.mark.parametrize("times", [Uniform(), Stratified()])
def test_one_and_eight_devices_see_the_same_noise(times):
  assert len(jax.devices()) == 8
  batch = text_batch(16)
  noise = jax.jit(lambda batch, step: Objective(times=times).noise(batch, 11, step, mask_id=MASK))
  one = noise(jax.device_put(batch, jax.devices()[0]), 4)
  rows_apart = jax.device_put(batch, batch_sharding(make_mesh()))
  assert len(rows_apart.tokens.sharding.device_set) == 8
  eight = noise(rows_apart, 4)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_array_equal(a, b)


def test_seed_step_and_row_each_change_the_noise():
  batch = text_batch(2, 64)
  batch = batch.replace(tokens=np.ones_like(batch.tokens))
  t = jnp.full(2, 0.5)

  def tokens(seed, step):
    keys = noise_keys(seed, step, jnp.arange(2))
    return np.asarray(mask_tokens(batch, t, keys, schedule=Linear(), mask_id=MASK).tokens)

  base = tokens(0, 0)
  assert (base == tokens(0, 0)).all()
  for other in (tokens(1, 0), tokens(0, 1), base[::-1]):
    assert (base != other).any()


def test_stratified_has_one_time_in_each_stratum_in_random_order():
  orders = set()
  for step in range(5):
    t = np.asarray(Stratified()(time_key(0, step), 10))
    offset = t.min()
    np.testing.assert_allclose(np.sort(t), offset + np.arange(10) / 10, atol=1e-6)
    orders.add(tuple(np.argsort(t)))
  assert len(orders) == 5


def test_antithetic_pairs_add_up_to_one():
  t = np.asarray(Antithetic()(time_key(0, 0), 9), np.float64)
  np.testing.assert_array_equal(t[0:8:2] + t[1:8:2], 1.0)


@pytest.mark.parametrize("inner", [Uniform(), Stratified()])
def test_band_squeezes_its_inner_sampler(inner):
  key = time_key(0, 0)
  t = Band(0.25, 0.75, inner)(key, 32)
  np.testing.assert_allclose(t, 0.25 + 0.5 * inner(key, 32), atol=1e-6)


@pytest.mark.parametrize("low,high", [(0.5, 0.5), (0.8, 0.3), (-0.1, 0.5), (0.5, 1.1)])
def test_a_band_out_of_order_is_an_error(low, high):
  with pytest.raises(ValueError, match=f"low={low}, high={high}"):
    Band(low, high)
