"""Attention for CPUs: a few rows of the batch at a time, probabilities recomputed backward.

The scores of a few rows stay in cache, and only the log of each softmax's norm is kept for the
backward pass. There the scores are computed transposed, so that two of its three sums over
queries are plain products: XLA multiplies a transposed left factor at half speed on a CPU.
Forward and backward took 0.63 of the time of the written-out softmax (B 16, L 256, N 4, H 64,
float32, 2-core AVX-512 machine).

Who may attend to whom is written out as bytes before the loop. Comparing segment ids inside it made
forward and backward take half as long again (78 against 52 ms, same shapes and machine); so they
take no longer than without segments.

Of a long row some queries are taken at a time, with all keys. With two rows of 4096 (N 4, H 64, float32)
forward took 0.56 of the time of `chunked`, with the backward pass 0.57; with one of 2112 0.88 and 0.75.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.reference import NEVER, allowed
from kernels_pallas.cpu import transposed
from kernels_pallas.op import vary_like

SCORES_PER_BLOCK = 1 << 19  # float32 scores that fit a core's cache twice
SCORES_AT_ONCE = 1 << 22  # of a long row: 16 MiB


def forward(query, key, value, segments=None, limits=None):
  """-> (out [B, L, N, H], log of the softmax norm float32[B, N, L])."""

  def rows(query, key, value, mask):
    q, k, v = _heads_first(query, key, value)

    def some(_, q, mask):
      scores = _scores(q, k, mask)
      peak = scores.max(-1, keepdims=True)
      weights = jnp.exp(scores - peak)
      norm = weights.sum(-1, keepdims=True)
      out = _batched(weights.astype(v.dtype), v) / norm
      return None, (out.astype(query.dtype), (peak + jnp.log(norm))[..., 0])

    _, (out, log_norm) = _over_queries(some, None, k, (q, 2), (mask, 1))
    return jnp.swapaxes(out, 1, 2), log_norm

  return _over_rows(rows, segments, limits, query, key, value)


def backward(query, key, value, segments, limits, out, log_norm, grad):
  """Gradients of query, key and value."""

  def rows(query, key, value, delta, log_norm, grad, mask):
    q, k, v = _heads_first(query, key, value)
    grad = jnp.swapaxes(grad, 1, 2)

    def some(sums, q, delta, log_norm, grad, mask):
      # [b, N, keys, queries] from here on.
      weights = jnp.exp(_scores(k, q, mask) - log_norm[:, :, None])
      dvalue = _batched(weights.astype(grad.dtype), grad)
      dweights = _batched(v, _right_transposed(grad))
      dscores = (weights * (dweights - delta[:, :, None])).astype(query.dtype)
      dkey = _batched(dscores, q)
      dquery = _batched(transposed(dscores), k) * query.shape[-1] ** -0.5
      return (sums[0] + dkey, sums[1] + dvalue), dquery.astype(query.dtype)

    zeros = vary_like(jnp.zeros(k.shape, jnp.float32), q, k, v, grad)
    mask = None if mask is None else jnp.swapaxes(mask, 1, 2)
    queries = (q, 2), (delta, 2), (log_norm, 2), (grad, 2), (mask, 2)
    sums, dquery = _over_queries(some, (zeros, zeros), k, *queries)
    dkey, dvalue = (_sum_groups(x, key.shape[2]) for x in sums)
    grads = (dquery, query.dtype), (dkey, key.dtype), (dvalue, value.dtype)
    return tuple(jnp.swapaxes(x, 1, 2).astype(dtype) for x, dtype in grads)

  delta = jnp.swapaxes((out.astype(jnp.float32) * grad).sum(-1), 1, 2)  # [B, N, L]
  return _over_rows(rows, segments, limits, query, key, value, delta, log_norm, grad)


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


def _over_rows(f, segments, limits, *args):
  """`f` of some rows of the batch, with bool[b, L, S] over (query, key) or None, until all are done."""
  (B, L, N), S = args[0].shape[:3], args[1].shape[1]
  rows = max(1, min(B, SCORES_PER_BLOCK // (N * L * S)))
  while B % rows:
    rows -= 1
  if limits is not None:
    limits = jnp.broadcast_to(limits, (B, L))
  # Before the loop that it is used in: over rows, or for a long one over its queries.
  short = _pieces(1, N, L, S) == 1
  args = (*args, allowed(segments, limits, S) if short else (segments, limits))

  def run(args):
    *args, mask = args
    return f(*args, mask if short else allowed(*mask, S))

  if rows == B:
    return run(args)
  blocks = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), args)
  return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), lax.map(run, blocks))


def _over_queries(f, carry, keys, *args):
  """(carry, results) of `f` over pieces of the queries, whose axis in each argument comes with it.

  keys: [b, N, S, H]. Results are [b, N, L, ...]. The last piece may reach beyond the end, with zeros.
  """
  (b, N, S, _), L = keys.shape, args[0][0].shape[2]
  pieces = _pieces(b, N, L, S)
  if pieces == 1:
    return f(carry, *(x for x, _ in args))
  size = -(-L // pieces)

  def split(x, axis):
    if x is None:
      return None
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, pieces * size - L)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], pieces, size, *x.shape[axis + 1 :]), axis, 0)

  carry, results = lax.scan(lambda c, xs: f(c, *xs), carry, [split(*arg) for arg in args])

  def joined(x):
    x = jnp.moveaxis(x, 0, 2)  # [b, N, pieces, size, ...]
    return x.reshape(b, N, -1, *x.shape[4:])[:, :, :L]

  return carry, jax.tree.map(joined, results)


def _pieces(b, N, L, S):
  """Into how many the queries are cut."""
  return min(L, -(-b * N * L * S // SCORES_AT_ONCE))
