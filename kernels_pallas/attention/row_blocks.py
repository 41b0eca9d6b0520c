"""Attention for CPUs: a few rows of the batch at a time, probabilities recomputed backward.

The scores of a few rows stay in cache, and only the log of each softmax's norm is kept for the
backward pass. There the scores are computed transposed, so that two of its three sums over
queries are plain products: XLA multiplies a transposed left factor at half speed on a CPU.
Forward and backward took 0.63 of the time of the written-out softmax (B 16, L 256, N 4, H 64,
float32, 2-core AVX-512 machine).

Who may attend to whom is written out as bytes before the loop. Comparing segment ids inside it made
forward and backward take half as long again (78 against 52 ms, same shapes and machine); so they
take no longer than without segments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.reference import NEVER, allowed
from kernels_pallas.cpu import transposed

SCORES_PER_BLOCK = 1 << 19  # float32 scores that fit a core's cache twice


def forward(query, key, value, segments=None, limits=None):
  """-> (out [B, L, N, H], log of the softmax norm float32[B, N, L])."""

  def rows(args):
    query, key, value, *mask = args
    q, k, v = _heads_first(query, key, value)
    scores = _scores(q, k, *mask)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    norm = weights.sum(-1, keepdims=True)
    out = _batched(weights.astype(v.dtype), v) / norm
    return jnp.swapaxes(out, 1, 2).astype(query.dtype), (peak + jnp.log(norm))[..., 0]

  return _map_rows(rows, query, key, value, _mask(query, key, segments, limits))


def backward(query, key, value, segments, limits, out, log_norm, grad):
  """Gradients of query, key and value."""

  def rows(args):
    query, key, value, delta, log_norm, grad, *mask = args
    q, k, v = _heads_first(query, key, value)
    grad = jnp.swapaxes(grad, 1, 2)
    # [b, N, keys, queries] from here on.
    scores = _scores(k, q, *mask)
    weights = jnp.exp(scores - log_norm[:, :, None])
    dvalue = _batched(weights.astype(grad.dtype), grad)
    dweights = _batched(v, _right_transposed(grad))
    dscores = (weights * (dweights - delta[:, :, None])).astype(query.dtype)
    dkey = _batched(dscores, q)
    dquery = _batched(transposed(dscores), k) * query.shape[-1] ** -0.5
    dkey, dvalue = (_sum_groups(g, key.shape[2]) for g in (dkey, dvalue))
    grads = (dquery, query.dtype), (dkey, key.dtype), (dvalue, value.dtype)
    return tuple(jnp.swapaxes(g, 1, 2).astype(dtype) for g, dtype in grads)

  mask = _mask(query, key, segments, limits)
  mask = None if mask is None else jnp.swapaxes(mask, 1, 2)
  delta = jnp.swapaxes((out.astype(jnp.float32) * grad).sum(-1), 1, 2)  # [B, N, L]
  return _map_rows(rows, query, key, value, delta, log_norm, grad, mask)


def _mask(query, key, segments, limits):
  """bool[B, L, S] over (query, key), or None."""
  mask = allowed(segments, limits, key.shape[1])
  return None if mask is None else jnp.broadcast_to(mask, (query.shape[0], *mask.shape[1:]))


def _heads_first(query, key, value):
  """[b, L, heads, H] -> [b, N, L, H] each: queries scaled, key heads repeated for their group."""
  group = query.shape[2] // key.shape[2]
  query = query * query.shape[-1] ** -0.5
  key, value = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (key, value))
  return tuple(jnp.swapaxes(x, 1, 2) for x in (query, key, value))


def _scores(rows, columns, mask=None):
  scores = _batched(rows, _right_transposed(columns))
  return scores if mask is None else jnp.where(mask[:, None], scores, NEVER)


def _right_transposed(x):
  """A right factor: only bfloat16 gains from moving the numbers."""
  return transposed(x) if x.dtype == jnp.bfloat16 else jnp.swapaxes(x, -1, -2)


def _batched(a, b):
  return jnp.einsum("bnij,bnjk->bnik", a, b, preferred_element_type=jnp.float32)


def _sum_groups(grad, kv_heads):
  b, heads, L, H = grad.shape
  return grad if heads == kv_heads else grad.reshape(b, kv_heads, -1, L, H).sum(2)


def _map_rows(f, *args):
  """`f` over blocks of the batch; a trailing None among `args` is left out."""
  args = tuple(x for x in args if x is not None)
  (B, L, N), S = args[0].shape[:3], args[1].shape[1]
  rows = max(1, min(B, SCORES_PER_BLOCK // (N * L * S)))
  while B % rows:
    rows -= 1
  if rows == B:
    return f(args)
  blocks = tuple(x.reshape(B // rows, rows, *x.shape[1:]) for x in args)
  return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), lax.map(f, blocks))
