"""Monte-Carlo lower bound on log-likelihood with exact, evenly spaced mask counts.

The bound is E over n uniform in 1..M of (M/n) times the nll of n masked positions chosen uniformly
among the M maskable ones. Fixing the count instead of masking independently takes out most of the
variance: LLaDA reports 128 samples where independent masks need over 1000 (arXiv 2502.09992).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lladax.types import Batch, BoolPerToken, PerExample, TokenNll

# The stream of a row's first count; no sample of a row has this index.
COUNTS_STREAM = 2**32 - 1


def log_likelihood_bound(
  token_nll: TokenNll,
  batch: Batch,
  *,
  seed: int | jax.Array,
  mask_id: int,
  mc_num: int = 128,
  mc_batch: int = 1,
  row_ids: jax.Array | None = None,
) -> PerExample:
  """A lower bound on log p(maskable tokens | the other tokens), in nats per row.

  An answer given its prompt: `maskable` on the answer. Held-out text: `maskable` on all text of a
  packed row and a few samples. Rows may have different numbers of maskable tokens; one without any
  scores 0. Pure and of fixed shapes: meant to be called under `jit`.

  The counts of a row are spread evenly over all `mc_num` samples, from a random start (LLaDA's
  evaluation spreads them within a batch of samples and rounds half to even, which favours some
  counts). So the estimate is unbiased for every `mc_num`, and `mc_batch` changes only how many
  samples go through the network at once.

  Args:
    token_nll: the network, called on [mc_batch * B, L] rows in the order of
      `repeat_rows(batch, mc_batch)`; bind positions and segments of that.
    batch: clean text [B, L].
    seed: integer, may be traced. With the row id it determines the estimate.
    mask_id: the id of MASK.
    mc_num: samples per row. One is exact for a single token.
    mc_batch: samples per call of the network; divides `mc_num`.
    row_ids: int32[B], default 0..B-1. The identity of a row, so that its estimate does not depend
      on its place in a batch.

  Returns:
    float32[B], at most 0.

  Raises:
    ValueError: if `mc_batch` does not divide `mc_num`, or either is below 1.
  """
  if mc_num < 1 or mc_batch < 1 or mc_num % mc_batch:
    raise ValueError(
      f"mc_batch divides mc_num, both at least 1; got mc_num={mc_num}, mc_batch={mc_batch}"
    )
  rows, length = batch.tokens.shape
  ids = jnp.arange(rows, dtype=jnp.uint32) if row_ids is None else row_ids
  keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(ids)  # [B]
  maskable_count = jnp.sum(batch.maskable, axis=1, dtype=jnp.int32)  # [B]
  targets = jnp.tile(batch.tokens, (mc_batch, 1))

  def chunk(total, first):
    samples = first + jnp.arange(mc_batch, dtype=jnp.int32)
    counts = mask_counts(keys, maskable_count, samples, mc_num=mc_num)  # [S, B]
    is_masked = jax.vmap(
      lambda sample, count: mask_exactly(fold_in_rows(keys, sample), batch.maskable, count)
    )(samples, counts)  # [S, B, L]
    scale = maskable_count / jnp.maximum(counts, 1)  # [S, B]
    weights = jnp.where(is_masked, scale[..., None].astype(jnp.float32), 0.0)
    flat = (mc_batch * rows, length)
    noisy = jnp.where(is_masked.reshape(flat), mask_id, targets)
    _, nll, _ = token_nll(noisy, targets, weights.reshape(flat))
    return total + jnp.sum(weights * nll.reshape(weights.shape), axis=(0, 2)), None

  firsts = jnp.arange(0, mc_num, mc_batch, dtype=jnp.int32)
  total, _ = jax.lax.scan(chunk, jnp.zeros(rows, jnp.float32), firsts)
  return -total / mc_num


def mask_counts(
  keys: jax.Array, maskable_count: jax.Array, samples: jax.Array, *, mc_num: int
) -> jax.Array:
  """How many tokens each sample of each row masks: `even_counts` from a random start.

  Args:
    keys: [B]. maskable_count: int32[B], M. samples: int32[S], sample numbers below `mc_num`.

  Returns:
    int32[S, B]; 0 where M is 0.
  """
  starts = jax.vmap(lambda key, high: jax.random.randint(key, (), 0, high))(
    fold_in_rows(keys, COUNTS_STREAM), jnp.maximum(maskable_count, 1)
  )  # [B]
  return even_counts(starts, maskable_count, samples, mc_num=mc_num)


def even_counts(
  starts: jax.Array, maskable_count: jax.Array, samples: jax.Array, *, mc_num: int
) -> jax.Array:
  """start + 1, and from there in `mc_num` even steps once around 1..M.

  In integers, so that with a start uniform over 0..M-1 each count alone is exactly uniform.

  Args:
    starts, maskable_count: int32[B]. samples: int32[S].

  Returns:
    int32[S, B]; 0 where M is 0.
  """
  room = jnp.maximum(maskable_count, 1)
  shift = (samples[:, None] * room + mc_num // 2) // mc_num  # [S, B]
  return jnp.where(maskable_count > 0, (starts + shift) % room + 1, 0)


def mask_exactly(keys: jax.Array, maskable: BoolPerToken, count: jax.Array) -> BoolPerToken:
  """Per row a uniformly random set of exactly `count` maskable positions. bool[B, L]."""
  length = maskable.shape[1]
  draws = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
  order = jnp.argsort(jnp.where(maskable, draws, 2.0), axis=1)
  rank = jnp.argsort(order, axis=1)
  return (rank < count[:, None]) & maskable


def fold_in_rows(keys: jax.Array, data: int | jax.Array) -> jax.Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def repeat_rows(batch: Batch, times: int) -> Batch:
  """The batch stacked `times` over: row r of repetition s at s * B + r."""
  return jax.tree.map(lambda x: jnp.tile(x, (times, 1)), batch)
