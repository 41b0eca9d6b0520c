"""Laws of the plan: a stable sort by expert and its inverse."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from lladax.moe import make_plan

# Few shapes, so that few are compiled.
SHAPES = [(1, 1, 1), (7, 2, 4), (16, 3, 3), (5, 4, 9)]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**31), skewed=st.booleans())
def test_order_sorts_and_inverse_undoes_it(shape, seed, skewed):
  T, k, E = shape
  rng = np.random.default_rng(seed)
  experts = rng.integers(0, max(1, E // 3) if skewed else E, size=(T, k)).astype(np.int32)
  plan = make_plan(jnp.asarray(experts), E)
  order, inverse, sizes = (np.asarray(x) for x in (plan.order, plan.inverse, plan.group_sizes))

  assert order.dtype == inverse.dtype == sizes.dtype == np.int32
  assert order.shape == inverse.shape == (T * k,) and sizes.shape == (E,)
  np.testing.assert_array_equal(order[inverse], np.arange(T * k))
  np.testing.assert_array_equal(inverse[order], np.arange(T * k))
  np.testing.assert_array_equal(sizes, np.bincount(experts.ravel(), minlength=E))
  assert sizes.sum() == T * k
  # Groups lie one after another, and slots of one expert keep their order: it is stable.
  expected = [s for e in range(E) for s in range(T * k) if experts.ravel()[s] == e]
  np.testing.assert_array_equal(order, expected)
