"""Laws of the routers and of the statistics, against NumPy in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.moe import SigmoidBias, TopKSoftmax, router_stats
from lladax.types import RowGroups

T, E, K = 12, 6, 2


def means(stats):
  """The sums of all groups over their tokens."""
  tokens = np.maximum(stats.tokens.sum(), 1)
  return {
    "load": stats.load_share(),
    "probability": stats.probability.sum(0) / tokens,
    "entropy": stats.entropy.sum() / tokens,
    "balance_loss": stats.balance_loss(),
    "z_loss": stats.z_loss(),
  }


def random_logits(seed=0, scale=2.0):
  return jnp.float32(scale * np.random.default_rng(seed).normal(size=(T, E)))


@jax.jit
def route(logits, valid=None):
  routing = TopKSoftmax()(logits, K)
  return routing, router_stats(logits, routing, valid)


def softmax(logits):
  exps = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True))
  return exps / exps.sum(1, keepdims=True)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 2.0, 20.0]))
def test_weights_are_the_largest_softmax_values_not_renormalised(seed, scale):
  logits = random_logits(seed, scale)
  routing, p = route(logits)[0], softmax(logits)
  np.testing.assert_allclose(routing.probabilities, p, rtol=5e-5, atol=1e-7)
  np.testing.assert_allclose(routing.weights, -np.sort(-p, axis=1)[:, :K], rtol=5e-5, atol=1e-7)
  chosen = np.take_along_axis(p, np.asarray(routing.experts), axis=1)
  np.testing.assert_allclose(routing.weights, chosen, rtol=5e-5, atol=1e-7)
  if scale < 1:  # nearly even: two of six hold about a third
    assert (np.asarray(routing.weights).sum(1) < 0.6).all()


def test_renormalising_and_scaling():
  plain = TopKSoftmax()(random_logits(), K)
  normed = TopKSoftmax(norm_topk_prob=True)(random_logits(), K)
  np.testing.assert_allclose(normed.weights.sum(1), 1, rtol=1e-6)
  ratio = normed.weights / plain.weights
  np.testing.assert_allclose(ratio[:, 0], ratio[:, 1], rtol=1e-6)  # proportions stay
  for router, base in [
    (TopKSoftmax(routed_scaling_factor=2.5), plain),
    (TopKSoftmax(norm_topk_prob=True, routed_scaling_factor=2.5), normed),
  ]:
    routing = router(random_logits(), K)
    np.testing.assert_allclose(routing.weights, 2.5 * base.weights, rtol=1e-6)
    np.testing.assert_array_equal(routing.experts, base.experts)


def test_the_softmax_is_in_float32():
  low = random_logits().astype(jnp.bfloat16)
  routing = TopKSoftmax()(low, K)
  assert routing.weights.dtype == jnp.float32
  np.testing.assert_allclose(routing.probabilities, softmax(low.astype(jnp.float32)), rtol=1e-5)


def test_stats_equal_numpy():
  logits = random_logits()
  stats, p = route(logits)[1], softmax(logits)
  got = means(stats)
  load = np.bincount(np.argsort(-p, axis=1)[:, :K].ravel(), minlength=E) / (T * K)
  np.testing.assert_allclose(got["load"], load, rtol=1e-6)
  np.testing.assert_allclose(got["probability"], p.mean(0), rtol=1e-5)
  np.testing.assert_allclose(got["entropy"], -(p * np.log(p)).sum(1).mean(), rtol=1e-5)
  np.testing.assert_allclose(got["balance_loss"], E * (load * p.mean(0)).sum(), rtol=1e-5)
  z = np.log(np.exp(np.asarray(logits, np.float64)).sum(1))
  np.testing.assert_allclose(got["z_loss"], (z**2).mean(), rtol=1e-5)
  assert stats.dropped == 0 and stats.tokens[0] == T


def test_groups_are_the_stats_of_their_tokens_alone():
  logits, rng = random_logits(), np.random.default_rng(3)
  index, valid = rng.integers(0, 3, T), rng.random(T) < 0.7
  index[index == 1] = 3  # a group of four stays empty
  groups = RowGroups(jnp.asarray(index), 4)
  got = jax.jit(router_stats)(logits, TopKSoftmax()(logits, K), jnp.asarray(valid), groups=groups)
  for group in range(4):
    want = route(logits, jnp.asarray(valid & (index == group)))[1]
    for name in ("tokens", "load", "probability", "entropy", "z"):
      a, b = getattr(got, name)[group], getattr(want, name)[0]
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  assert got.tokens[1] == 0 and got.tokens.sum() == valid.sum()


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
  logits, valid = random_logits(), np.arange(T) % 5 > 0

  def loss(ends, logits, load_share=None, tokens=None):
    rows = slice(*ends)
    stats = router_stats(logits[rows], TopKSoftmax()(logits[rows], K), jnp.asarray(valid[rows]))
    return stats.balance_loss(load_share, tokens) + stats.z_loss(tokens)

  load_share = route(logits, jnp.asarray(valid))[1].load_share()
  derive = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
  whole = derive((0, T), logits)
  parts = [derive(ends, logits, load_share, valid.sum()) for ends in ((0, 2), (2, 9), (9, T))]
  added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), added, whole)
  # With its own load, a part presses on others than the whole does.
  own = derive((0, 2), logits, None, valid.sum())[1][:2]
  assert np.abs(own - whole[1][:2]).max() > 0.01


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balanced_is_one(k):
  # Token t prefers experts t .. t + k - 1, round and round.
  preferred = (np.arange(T)[:, None] + np.arange(k)) % E
  logits = np.zeros((T, E), np.float32)
  np.put_along_axis(logits, preferred, np.float32(3 - 0.1 * np.arange(k)), axis=1)
  stats = router_stats(jnp.asarray(logits), TopKSoftmax()(jnp.asarray(logits), k))
  np.testing.assert_allclose(stats.load_share(), 1 / E, rtol=1e-6)
  np.testing.assert_allclose(stats.balance_loss(), 1, rtol=1e-5)


def test_collapse_is_the_number_of_experts():
  logits = jnp.zeros((T, E)).at[:, 4].set(100.0)
  stats = router_stats(logits, TopKSoftmax()(logits, 1))
  np.testing.assert_allclose(stats.load_share(), np.eye(E)[4], rtol=1e-6)
  np.testing.assert_allclose(stats.balance_loss(), E, rtol=1e-6)
  assert stats.entropy[0] == 0  # p log p at p = 0 is 0 and not NaN
  gradient = jax.grad(lambda x: router_stats(x, TopKSoftmax()(x, 1)).entropy.sum())(logits)
  assert np.isfinite(gradient).all()


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), real=st.sampled_from([1, 5, T]))
def test_padding_is_left_out(seed, real):
  logits, rng = random_logits(seed), np.random.default_rng(seed)
  valid = np.isin(np.arange(T), rng.permutation(T)[:real])
  poisoned = jnp.where(valid[:, None], logits, jnp.float32(7.0))
  got = route(poisoned, valid=jnp.asarray(valid))[1]
  want = route(logits[valid])[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
  np.testing.assert_allclose(got.load.sum(), real, rtol=1e-6)
  np.testing.assert_allclose(got.probability.sum(), real, rtol=1e-6)


def test_nothing_but_padding():
  logits = random_logits()
  stats = route(logits, valid=jnp.zeros(T, bool))[1]
  for leaf in jax.tree.leaves((stats, means(stats))):
    np.testing.assert_array_equal(leaf, 0)


def test_permuting_experts_permutes_the_stats():
  logits, permutation = random_logits(), np.random.default_rng(1).permutation(E)
  plain, moved = route(logits)[1], route(logits[:, permutation])[1]
  plain, moved = means(plain), means(moved)
  for name in ("load", "probability"):
    np.testing.assert_allclose(moved[name], plain[name][permutation], rtol=1e-6, atol=1e-7)
  for name in ("entropy", "balance_loss", "z_loss"):
    np.testing.assert_allclose(moved[name], plain[name], rtol=1e-6)


def test_the_balance_loss_acts_through_probability_alone():
  logits = random_logits()
  load = np.asarray(route(logits)[1].load_share())
  got = np.asarray(jax.grad(lambda x: route(x)[1].balance_loss())(logits))
  # d/dlogits of E / T * sum_te load_e p_te with the load held still.
  p = softmax(logits)
  want = E / T * p * (load - (p * load).sum(1, keepdims=True))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
  assert np.abs(got).max() > 1e-3


def sigmoid_groups(logits, bias, k, n_group, topk_group, scale):
  """The published rule, one token and one comparison at a time: experts -> weight."""
  rows = []
  for row in np.asarray(logits, np.float64):
    scores = 1 / (1 + np.exp(-row))
    choice = scores + bias
    groups = np.array_split(np.arange(len(row)), n_group)
    group_scores = [np.sort(choice[g])[-2:].sum() for g in groups]
    stay = np.argsort(group_scores)[-topk_group:]
    candidates = np.concatenate([groups[g] for g in stay])
    chosen = candidates[np.argsort(choice[candidates])[-k:]]
    total = scores[chosen].sum()
    rows.append({int(e): scale * scores[e] / total for e in chosen})
  return rows


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**31), shape=st.sampled_from([(16, 4, 4, 2), (12, 3, 3, 1), (8, 2, 1, 1)])
)
def test_sigmoid_router_equals_the_published_rule(seed, shape):
  experts, k, n_group, topk_group = shape
  rng = np.random.default_rng(seed)
  logits = np.float32(2 * rng.normal(size=(7, experts)))
  bias = np.float32(0.5 * rng.normal(size=experts))  # negative sums of scores and bias, too
  router = SigmoidBias(n_group=n_group, topk_group=topk_group, routed_scaling_factor=2.5)
  routing = router(jnp.asarray(logits), k, jnp.asarray(bias))
  got = [
    dict(zip(e.tolist(), w.tolist(), strict=True))
    for e, w in zip(np.asarray(routing.experts), np.asarray(routing.weights), strict=True)
  ]
  want = sigmoid_groups(logits, bias, k, n_group, topk_group, 2.5)
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[e] for e in b], list(b.values()), rtol=1e-5)


@pytest.mark.parametrize("router", [SigmoidBias(), TopKSoftmax(expert_bias=True)], ids=repr)
def test_the_bias_moves_the_choice_but_not_the_weight(router):
  assert router.has_bias and not TopKSoftmax().has_bias
  logits, bias = jnp.float32([[2.0, 1.0, 0.0, -1.0]]), jnp.float32([0.0, 0.0, 0.0, 9.0])
  plain, biased = router(logits, 1, jnp.zeros(4)), router(logits, 1, bias)
  assert (int(plain.experts[0, 0]), int(biased.experts[0, 0])) == (0, 3)
  np.testing.assert_array_equal(plain.probabilities, biased.probabilities)
  assert float(biased.weights[0, 0]) <= 1  # nothing of the 9
  gradient = jax.grad(lambda b: router(logits, 2, b).weights.sum())(bias)
  np.testing.assert_array_equal(gradient, 0)


def test_impossible_groups_are_named():
  with pytest.raises(ValueError, match="topk_group .* n_group=2; got 3"):
    SigmoidBias(n_group=2, topk_group=3)
  for router, k in ((SigmoidBias(n_group=5), 1), (SigmoidBias(n_group=4, topk_group=1), 3)):
    with pytest.raises(ValueError, match=f"cannot choose {k} of 8 experts"):
      router(jnp.zeros((1, 8)), k, jnp.zeros(8))
