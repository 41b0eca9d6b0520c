"""Tokens from logits: ids that may not be written, temperature, top-k and top-p, probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.argmax import argmax


def draw_tokens(
  logits: jax.Array,
  keys: jax.Array,
  positions: jax.Array,
  *,
  temperature: float | jax.Array | None,
  top_k: int | None = None,
  top_p: float | jax.Array | None = None,
) -> jax.Array:
  """Tokens int32[B, W] from logits [B, W, V]: argmax, or samples of softmax(logits / temperature).

  LLaDA's reference takes the argmax of exp(logits) / (-log u)**temperature in float64. The
  logarithm of that is logits + temperature * g with g = -log(-log u) standard Gumbel, and the
  argmax is the same since log is increasing; in this form nothing overflows in float32. The long
  upper tail of g, where plain float32 draws run out of digits and rare tokens would never be
  written, is what mode="high" is for.

  Args:
    keys: [B], of the row and iteration.
    positions: int32[B, W]; the noise of a position is a function of its row's key and of the
      position itself, so it does not depend on the window or on padding.
    temperature: one number or float32[B], above 0. 0 or None for the argmax of all rows, among equals
      the lowest id; it is always within top-k and top-p, which then change nothing.
    top_k, top_p: draw only among these, see `likely`; None for all. top_p may be float32[B].

  Raises:
    ValueError: top_k below 1, top_p outside [0, 1].
  """
  if top_k is not None and top_k < 1:
    raise ValueError(f"top_k is at least 1, or None for no limit; got {top_k}")
  if isinstance(top_p, float) and not 0.0 <= top_p <= 1.0:
    raise ValueError(f"top_p lies between 0 and 1, or is None for no limit; got {top_p}")
  if not (temperature is None or isinstance(temperature, int | float) and temperature == 0):
    temperature, top_p = (_by_row(x) for x in (temperature, top_p))
    vocabulary = logits.shape[-1]

    def noise(key, position):
      position_key = jax.random.fold_in(key, position)
      return jax.random.gumbel(position_key, (vocabulary,), jnp.float32, mode="high")

    gumbel = jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(keys, positions)  # [B, W, V]
    allowed = likely(logits / temperature, top_k=top_k, top_p=top_p)
    logits = jnp.where(allowed, logits + temperature * gumbel, -jnp.inf)
  return argmax(logits)


def _by_row(x):
  """A number or None; numbers [B] as [B, 1, 1]."""
  return x[:, None, None] if isinstance(x, jax.Array) and x.ndim else x


def likely(logits: jax.Array, *, top_k: int | None, top_p: float | jax.Array | None) -> jax.Array:
  """The tokens bool[..., V] that top-k and top-p leave, of logits [..., V] after temperature.

  top_p keeps the most likely tokens up to and with the one that brings their probability above
  top_p; top_k keeps k of all. With both, a token must pass both: this is the order of Dream
  (arXiv 2508.15487, `sample_tokens`), whose top-p sees the whole distribution. Each is a lowest
  logit, so tokens that tie with the last one kept are kept with it. The most likely token is kept
  always.
  """
  allowed = jnp.ones(logits.shape, bool)
  if top_k is not None and top_k < logits.shape[-1]:
    allowed &= logits >= lowest_kept(logits, jnp.ones_like(logits), top_k - 1)
  if top_p is not None and not (isinstance(top_p, float) and top_p >= 1.0):
    allowed &= logits >= lowest_kept(logits, jax.nn.softmax(logits, axis=-1), top_p)
  return allowed


def lowest_kept(logits: jax.Array, weight: jax.Array, most: float | jax.Array) -> jax.Array:
  """The lowest logit such that all higher ones weigh at most `most`. [..., 1].

  Found by halving the span of the logits 32 times, each a pass over them, without a sort: of 64
  times 157,184 logits on two cores of a CPU it takes 0.4 s and a sort with its sums 2.4 s.
  """

  def halve(_, span):
    low, high = span
    middle = (low & high) + ((low ^ high) >> 1)  # their mean rounded down, without overflow
    enough = jnp.sum(jnp.where(order > middle, weight, 0.0), axis=-1, keepdims=True) <= most
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  order = flip_negative(jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32))
  ends = (f(order, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
  low, _ = jax.lax.fori_loop(0, 32, halve, tuple(ends))
  return jax.lax.bitcast_convert_type(flip_negative(low), jnp.float32)


def flip_negative(bits: jax.Array) -> jax.Array:
  """Between the bits of float32 and whole numbers int32 in the same order; its own inverse."""
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def token_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """softmax(logits)[tokens], float32: without noise or temperature, which would leak into it."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def remove_ids(logits: jax.Array, ids: tuple[int, ...]) -> jax.Array:
  """Logits [..., V] with -inf at `ids`, which are then never written."""
  return jnp.where(is_any(jnp.arange(logits.shape[-1]), ids), -jnp.inf, logits)


def remove_ids_before(
  logits: jax.Array, ids: tuple[int, ...], positions: jax.Array, first: jax.Array
) -> jax.Array:
  """Logits [B, W, V] with -inf at `ids` where positions int32[B, W] < first int32[B].

  With the ids that end a text it gives every row a minimum length.
  """
  early = (positions < first[:, None])[..., None]  # [B, W, 1]
  return jnp.where(early & is_any(jnp.arange(logits.shape[-1]), ids), -jnp.inf, logits)


def is_any(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
  """bool[...], where tokens [...] are one of `ids`."""
  return jnp.isin(tokens, jnp.asarray(ids, jnp.int32))
