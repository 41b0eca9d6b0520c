"""The law of every router: k distinct experts a token, weights that can be multiplied by.

Routers are found by search, as in `test_strategies`: a new one needs defaults and no test file.
"""

import functools
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lladax.moe
from lladax.moe import Router, router_stats


def routers() -> list[Router]:
  """Every concrete router of the project by default, and each of its flags turned."""
  classes, waiting = [], [Router]
  while waiting:
    for subclass in waiting.pop().__subclasses__():
      waiting.append(subclass)
      if not inspect.isabstract(subclass) and subclass.__module__.startswith("lladax."):
        classes.append(subclass)
  turned = [
    cls(**{name: not value})
    for cls in classes
    for name, value in vars(cls()).items()
    if isinstance(value, bool)
  ]
  return sorted([cls() for cls in classes] + turned, key=repr)


@functools.partial(jax.jit, static_argnums=(0, 2))
def route(router, logits, k):
  routing = router(logits, k)
  return routing, router_stats(logits, routing)


EVERY_ROUTER = pytest.mark.parametrize("router", routers(), ids=repr)


def test_the_search_finds_them_and_they_are_values():
  assert len(routers()) >= 2
  for router in routers():
    assert eval(repr(router), vars(lladax.moe)) == router
    assert hash(eval(repr(router), vars(lladax.moe))) == hash(router)


@st.composite
def logits_and_k(draw):
  # Few shapes, so that few are compiled; the last one takes every expert.
  experts, k = draw(st.sampled_from([(2, 1), (8, 2), (8, 8)]))
  rng = np.random.default_rng(draw(st.integers(0, 2**31)))
  scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))  # 0: all equal
  return jnp.float32(scale * rng.normal(size=(5, experts))), k


@EVERY_ROUTER
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(case=logits_and_k())
def test_experts_are_distinct_and_weights_finite(router, case):
  logits, k = case
  routing, stats = route(router, logits, k)
  weights, experts = np.asarray(routing.weights), np.asarray(routing.experts)
  assert weights.shape == experts.shape == (5, k) and routing.probabilities.shape == logits.shape
  assert weights.dtype == np.float32 and experts.dtype == np.int32
  assert (experts >= 0).all() and (experts < logits.shape[1]).all()
  assert all(len(set(row)) == k for row in experts.tolist())
  assert np.isfinite(weights).all() and (weights >= 0).all()
  # A router of single scores may give nothing to a token that no expert wants (float32 ends there).
  wanted = np.asarray(logits).max(1) > -80
  assert (weights.max(1) > 0)[wanted].all()
  assert np.isfinite(routing.probabilities).all() and (np.asarray(routing.probabilities) >= 0).all()
  load = np.asarray(stats.load_share())
  np.testing.assert_allclose(
    load, np.bincount(experts.ravel(), minlength=len(load)) / (5 * k), atol=1e-6
  )


@EVERY_ROUTER
def test_a_token_is_routed_by_its_own_logits(router):
  logits = jnp.float32(np.random.default_rng(0).normal(size=(6, 8)))
  together, alone = (route(router, rows, 2)[0] for rows in (logits, logits[3:4]))
  np.testing.assert_array_equal(together.experts[3:4], alone.experts)
  np.testing.assert_allclose(together.weights[3:4], alone.weights, rtol=1e-6)
