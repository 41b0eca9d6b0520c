"""Tokens from logits: top-k and top-p against Dream's filters in NumPy, minimum length, noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.infer.drawing import draw_tokens, likely, remove_ids, remove_ids_before

draw = jax.jit(draw_tokens, static_argnames=("temperature", "top_k", "top_p"))


def keys(rows, seed=0):
  return jax.vmap(jax.random.key)(np.arange(rows) + 100_000 * seed)


def dream_filter(logits, *, top_k, top_p):
  """Dream's top_p_logits, then its top_k_logits, for one position: bool[V]."""
  logits = logits.astype(np.float64)
  keep = np.ones(len(logits), bool)
  if top_p is not None and top_p < 1:
    order = np.argsort(-logits, kind="stable")
    probability = np.exp(logits[order] - logits.max())
    cumulative = np.cumsum(probability / probability.sum())
    remove = cumulative > top_p
    remove[1:] = remove[:-1].copy()
    remove[0] = False
    keep[order[remove]] = False
    logits = np.where(keep, logits, -np.inf)
  if top_k is not None:
    keep &= logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
  return keep


@pytest.mark.quick
@pytest.mark.parametrize(
  "top_k,top_p", [(None, 0.9), (3, None), (3, 0.5), (1, 0.9), (50, 0.0), (None, 1.0), (4, 0.7)]
)
def test_top_k_and_top_p_leave_what_dream_leaves(top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(40, 11)).astype(np.float32) * 3
  logits[:, 10] = -np.inf
  allowed = np.asarray(likely(jnp.asarray(logits), top_k=top_k, top_p=top_p))
  for row, own in zip(logits, allowed, strict=True):
    expected = dream_filter(row, top_k=top_k, top_p=top_p)
    np.testing.assert_array_equal(own[:10], expected[:10])


def test_the_cut_is_exact_among_many_tokens_of_either_sign():
  logits = np.random.default_rng(3).normal(size=(8, 5000)).astype(np.float32) * 4
  logits[:, :3] = [-np.inf, 0.0, -0.0]
  cut = jax.jit(likely, static_argnames=("top_k", "top_p"))
  fifty = np.asarray(cut(logits, top_k=50, top_p=None))
  assert (fifty.sum(axis=1) == 50).all()
  assert (logits.max(axis=1, where=~fifty, initial=-np.inf) < np.sort(logits)[:, -50]).all()
  most = np.asarray(cut(logits, top_k=None, top_p=0.9))
  p = np.exp(logits.astype(np.float64))
  p = np.where(most, p / p.sum(axis=1, keepdims=True), 0)
  kept, least = p.sum(axis=1), np.min(p, axis=1, where=most, initial=1.0)
  assert (kept > 0.9 - 1e-6).all() and (kept - least < 0.9 + 1e-6).all()
  higher = logits > np.min(logits, axis=1, where=most, initial=np.inf)[:, None]
  assert (most >= higher).all()


def test_what_ties_with_the_last_one_kept_is_kept():
  logits = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2]))
  assert likely(logits, top_k=2, top_p=None).all()
  assert likely(logits, top_k=None, top_p=0.5).all()
  np.testing.assert_array_equal(likely(logits, top_k=None, top_p=0.3), [True, False, False, False])
  close = jnp.array([1.0, np.nextafter(np.float32(1), np.float32(0)), -5.0])
  np.testing.assert_array_equal(likely(close, top_k=1, top_p=None), [True, False, False])


def test_draws_follow_the_filtered_and_tempered_distribution():
  rows, temperature = 20_000, 0.5
  logits = np.log(np.array([0.35, 0.3, 0.2, 0.1, 0.05], np.float32))
  tempered = np.exp(logits / temperature)
  tempered /= tempered.sum()  # 0.46, 0.34, 0.15, 0.04, 0.01
  spread = jnp.broadcast_to(logits, (rows, 1, 5))
  positions = jnp.zeros((rows, 1), jnp.int32)
  drawn = draw(spread, keys(rows), positions, temperature=temperature, top_p=0.9)
  expected = np.where(np.arange(5) < 3, tempered, 0)
  expected /= expected.sum()
  frequency = np.bincount(np.asarray(drawn)[:, 0], minlength=5) / rows
  assert (np.abs(frequency - expected) <= 4 * np.sqrt(expected * (1 - expected) / rows)).all()
  first = draw(spread, keys(rows), positions, temperature=temperature, top_k=1)
  assert (np.asarray(first) == 0).all()


def test_without_temperature_there_is_nothing_to_filter():
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 9)), jnp.float32)
  positions = jnp.zeros((2, 3), jnp.int32)
  drawn = draw(logits, keys(2), positions, temperature=0.0, top_k=2, top_p=0.1)
  np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1))


def test_noise_is_of_the_row_and_the_position_whatever_the_window():
  logits = jnp.zeros((3, 8, 50))
  positions = jnp.broadcast_to(jnp.arange(8), (3, 8))
  sample = functools.partial(draw, temperature=1.0, top_k=40)
  whole = np.asarray(sample(logits, keys(3), positions))
  part = np.asarray(sample(logits[1:2, 2:6], keys(3)[1:2], positions[1:2, 2:6]))
  np.testing.assert_array_equal(part, whole[1:2, 2:6])
  assert (whole[0] != whole[1]).any() and len(set(whole[0].tolist())) > 3
  assert (np.asarray(sample(logits, keys(3, seed=1), positions)) != whole).any()


def test_removed_ids_are_never_drawn_and_others_keep_their_logits():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 6)), jnp.float32)
  removed = np.asarray(remove_ids(logits, (1, 5)))
  assert (removed[..., [1, 5]] == -np.inf).all()
  np.testing.assert_array_equal(removed[..., [0, 2, 3, 4]], logits[..., jnp.array([0, 2, 3, 4])])
  np.testing.assert_array_equal(remove_ids(logits, ()), logits)


def test_a_minimum_length_holds_the_ends_back_before_its_column():
  logits = jnp.zeros((2, 4, 5))
  positions = jnp.array([[3, 4, 5, 6], [7, 8, 9, 10]])
  held = np.asarray(remove_ids_before(logits, (2, 4), positions, jnp.array([5, 7])))
  early = [[True, True, False, False], [False, False, False, False]]
  np.testing.assert_array_equal((held == -np.inf)[..., 2], early)
  np.testing.assert_array_equal((held == -np.inf)[..., 4], early)
  assert (held[..., [0, 1, 3]] == 0).all()


@pytest.mark.parametrize(
  "limits,message",
  [
    ({"top_k": 0}, "top_k is at least 1, or None for no limit; got 0"),
    ({"top_p": 1.5}, "top_p lies between 0 and 1, or is None for no limit; got 1.5"),
    ({"top_p": float("nan")}, "top_p.*nan"),
  ],
)
def test_limits_out_of_range_are_errors(limits, message):
  with pytest.raises(ValueError, match=message):
    draw_tokens(jnp.zeros((1, 1, 3)), keys(1), jnp.zeros((1, 1), int), temperature=1.0, **limits)
