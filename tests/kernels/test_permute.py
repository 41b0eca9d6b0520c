"""One suite for every implementation of dispatch and combine, against one-hot matrices."""

import contextlib
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernels_pallas import op
from kernels_pallas.permute import (
  IMPLEMENTATIONS,
  collect,
  combine,
  dispatch,
  pallas_tpu,
  reference,
)
from kernels_pallas.permute.api import PLATFORMS

# Several grid steps of several chunks, the last of them not full.
T, K, D, R = 21, 3, 256, 50


@contextlib.contextmanager
def small_tiles(implementation):
  with contextlib.ExitStack() as stack:
    if implementation in PLATFORMS:
      stack.enter_context(op.interpret())
      patch = stack.enter_context(pytest.MonkeyPatch.context())
      for name in ("GATHER", "COMBINE"):
        patch.setattr(pallas_tpu, name, op.Tiling(rows=48, columns=128, step=24))
    yield


def plan(here, seed=0):
  """Slots in a random order, of which `here` have a row; the rest of the R rows is padding."""
  slots = np.random.default_rng(seed).permutation(T * K)[:here]
  order = np.full(R, T * K + 5)
  order[:here] = slots
  inverse = np.full(T * K, R + 7)
  inverse[slots] = np.arange(here)
  return jnp.array(order, jnp.int32), jnp.array(inverse, jnp.int32)


def one_hot(order):
  """float32[R, T * k]: which slot a row is."""
  return (order[:, None] == jnp.arange(T * K)).astype(jnp.float32)


def operands():
  keys = jax.random.split(jax.random.key(0), 5)
  x, dy = (jax.random.normal(key, (T, D)) for key in keys[:2])
  rows, drows = (jax.random.normal(key, (R, D)) for key in keys[2:4])
  return x, dy, rows, drows, jax.random.uniform(keys[4], (T, K))


@functools.cache
def compiled(implementation):
  """Both ops and their derivatives, compiled once for all plans."""

  @jax.jit
  def run(x, dy, rows, drows, weights, order, inverse):
    run = dict(implementation=implementation)
    dispatched, dispatch_vjp = jax.vjp(lambda x: dispatch(x, order, inverse, K, **run), x)
    y, combine_vjp = jax.vjp(lambda r, w: combine(r, w, order, inverse, **run), rows, weights)
    total, collect_vjp = jax.vjp(lambda r: collect(r, order, inverse, K, **run), rows)
    gradients = *dispatch_vjp(drows), *combine_vjp(dy), *collect_vjp(dy)
    return dispatched, y, total, *gradients

  with small_tiles(implementation):
    return run.lower(*operands(), *plan(R)).compile()


def assert_equals_one_hot_products(implementation, here, seed=0):
  order, inverse = plan(here, seed)
  x, dy, rows, drows, weights = operands()
  live = (jnp.arange(R) < here)[:, None]
  nan = jnp.where(live, 0.0, jnp.nan)
  got = compiled(implementation)(x, dy, rows + nan, drows + nan, weights, order, inverse)

  hot = one_hot(order)
  tokens = hot.reshape(R, T, K).sum(2)
  weighted = (hot * weights.reshape(-1)).reshape(R, T, K).sum(2)
  products = (rows @ dy.T)[:, :, None] * hot.reshape(R, T, K)
  want = {
    "dispatched": tokens @ x,
    "combined": weighted.T @ rows,
    "collected": tokens.T @ rows,
    "gradient of dispatch": tokens.T @ drows,
    "rows' gradient of combine": weighted @ dy,
    "weights' gradient of combine": products.sum(0),
    "gradient of collect": tokens @ dy,
  }
  for a, (name, b) in zip(got, want.items(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("here", [R, 31, 1, 0])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_values_and_gradients_equal_one_hot_products(implementation, here):
  assert_equals_one_hot_products(implementation, here)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(here=st.integers(0, R), seed=st.integers(0, 2**20))
def test_any_plan(implementation, here, seed):
  assert_equals_one_hot_products(implementation, here, seed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_sum_over_slots_is_in_float32(implementation):
  order, inverse = plan(R)
  rows = jnp.ones((R, D), jnp.bfloat16).at[1::2].set(2**-9)
  weights = jnp.ones((T, K))
  with small_tiles(implementation):
    got = combine(rows, weights, order, inverse, implementation=implementation)
  exact = combine(rows.astype(jnp.float32), weights, order, inverse, implementation="reference")
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 384, 200])
def test_rows_of_other_widths(width):
  """200 is no multiple of 128 lanes: gathered by XLA."""
  order, inverse = plan(31)
  x, rows = operands()[0][:, :200], operands()[2][:, :200]
  x, rows = (jnp.tile(a, 2)[:, :width].astype(jnp.bfloat16) for a in (x, rows))
  index, inverse = order // K, inverse.reshape(T, K)
  scale = jnp.arange(1.0, R + 1)
  with small_tiles("pallas_tpu"):
    np.testing.assert_array_equal(pallas_tpu.gather(x, index), reference.gather(x, index))
    got = (
      *pallas_tpu.gather_scaled(x, index, scale, rows),
      pallas_tpu.weighted_combine(rows, None, inverse),
    )
  want = (
    *reference.gather_scaled(x, index, scale, rows),
    reference.weighted_combine(rows, None, inverse),
  )
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(*(v.astype(jnp.float32) for v in (a, b)), rtol=2**-7, atol=1e-3)


def test_tokens_of_devices_with_different_plans():
  """Types of a `shard_map` are checked; a replicated x gets the sum of the devices' gradients."""
  plans = [plan(31), plan(R, seed=1)]
  order, inverse = (jnp.concatenate(a) for a in zip(*plans, strict=True))
  x, _, _, drows, weights = operands()
  mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

  def one(x, weights, order, inverse):
    return combine(jnp.tanh(dispatch(x, order, inverse, K)), weights, order, inverse)

  def spread(x, weights):
    f = jax.shard_map(one, mesh=mesh, in_specs=(P(), P(), P("a"), P("a")), out_specs=P("a"))
    return f(x, weights, order, inverse)

  def apart(x, weights):
    return jnp.concatenate([one(x, weights, *each) for each in plans])

  grad = jnp.concatenate([drows[:T], drows[T : 2 * T]])
  got, want = (jax.jit(lambda f=f: jax.vjp(f, x, weights)[1](grad))() for f in (spread, apart))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bad_input():
  order, inverse = plan(R)
  x, _, rows, _, weights = operands()
  with pytest.raises(ValueError, match=r"inverse \[T \* k\].*\(62,\)"):
    dispatch(x, order, inverse[1:], K)
  with pytest.raises(ValueError, match="for k=4"):
    collect(rows, order, inverse, 4)
  with pytest.raises(ValueError, match=r"order \[R\]"):
    combine(rows, weights, order[1:], inverse)
  with pytest.raises(ValueError, match="'sort'.*reference"):
    combine(rows, weights, order, inverse, implementation="sort")
  for name, platform in PLATFORMS.items():
    with pytest.raises(ValueError, match=f"'{name}' runs on {platform} only"):
      dispatch(x, order, inverse, K, implementation=name)
