"""Attention in plain XLA for any platform, shape and dtype: some queries at a time.

The scores of one chunk of queries with all keys are alive at once, never those of all; backward
they are computed again, and the gradients of keys and values add up in float32 over the chunks.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.reference import NEVER, allowed
from kernels_pallas.op import vary_like

SCORES_PER_CHUNK = 1 << 24  # float32: 64 MiB
LEAST_QUERIES = 8  # below that, products are too thin for any matrix unit


def forward(query, key, value, segments=None, limits=None):
  """-> (out [B, L, N, H], log of the softmax norm float32[B, N, L])."""
  B, L, N, H = query.shape
  chunks = _Chunks(query, key, segments, limits)

  def body(_, i):
    scores = chunks.scores(i, query, key)
    peak = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    norm = weights.sum(-1, keepdims=True)
    out = jnp.einsum(
      "bkgcs,bskh->bkgch", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return None, ((out / norm).astype(query.dtype), (peak + jnp.log(norm))[..., 0])

  _, (out, log_norm) = lax.scan(body, None, jnp.arange(chunks.number))
  out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, N, H)  # from [n, B, K, G, C, H]
  log_norm = jnp.moveaxis(log_norm, 0, 3).reshape(B, N, -1)  # from [n, B, K, G, C]
  return out[:, :L], log_norm[..., :L]


def backward(query, key, value, segments, limits, out, log_norm, grad):
  """Gradients of query, key and value."""
  B, L, N, H = query.shape
  chunks = _Chunks(query, key, segments, limits)
  delta = (out.astype(jnp.float32) * grad).sum(-1)  # [B, L, N]
  log_norm = jnp.swapaxes(log_norm, 1, 2)
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def body(carry, i):
    dkey, dvalue = carry
    q, g, norm, d = (chunks.take(i, x) for x in (query, grad, log_norm, delta))
    # Rows beyond the last query are zeros in all four: their weights are 1 or 0 and reach nothing.
    weights = jnp.exp(chunks.scores(i, query, key) - _by_head(norm))
    dvalue += einsum("bkgcs,bckgh->bskh", weights.astype(g.dtype), g)
    dweights = einsum("bckgh,bskh->bkgcs", g, value)
    dscores = (weights * (dweights - _by_head(d))).astype(query.dtype)
    dkey += einsum("bkgcs,bckgh->bskh", dscores, q) * H**-0.5
    dquery = einsum("bkgcs,bskh->bckgh", dscores, key) * H**-0.5
    return (dkey, dvalue), dquery.astype(query.dtype)

  zeros = vary_like(jnp.zeros(key.shape, jnp.float32), query, key, value, grad)
  (dkey, dvalue), dquery = lax.scan(body, (zeros, zeros), jnp.arange(chunks.number))
  dquery = jnp.moveaxis(dquery, 0, 1).reshape(B, -1, N, H)[:, :L]
  return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype)


def _by_head(x):
  """[B, C, K, G] -> [B, K, G, C, 1]."""
  return jnp.moveaxis(x, 1, 3)[..., None]


class _Chunks:
  """Which queries are in which chunk; the last one reaches beyond the end."""

  def __init__(self, query, key, segments, limits):
    B, L, N, _ = query.shape
    self.length, self.keys, self.heads = L, key.shape[1], key.shape[2]
    fit = max(LEAST_QUERIES, SCORES_PER_CHUNK // (B * N * self.keys))
    # Chunks of equal size, by the rows that matrix units take at a time: little lies beyond the end.
    multiple = min(128, 1 << (fit.bit_length() - 1))
    share = -(-L // -(-L // (fit // multiple * multiple)))
    self.size = min(L, -(-share // multiple) * multiple)
    self.number = -(-L // self.size)
    self.segments, self.limits = segments, limits

  def take(self, i, x, axis=1):
    """Rows of chunk i of [B, L, ...], heads split as [K, G]; beyond the end they are zeros."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, self.number * self.size - self.length)
    x = lax.dynamic_slice_in_dim(jnp.pad(x, pad), i * self.size, self.size, axis)
    return x if x.ndim < 3 else x.reshape(*x.shape[:2], self.heads, -1, *x.shape[3:])

  def scores(self, i, query, key):
    """float32[B, K, G, C, S] of chunk i, masked."""
    q = self.take(i, query) * query.shape[-1] ** -0.5
    scores = jnp.einsum("bckgh,bskh->bkgcs", q, key, preferred_element_type=jnp.float32)
    segments = self.segments and (self.take(i, self.segments[0]), self.segments[1])
    limits = None if self.limits is None else self.take(i, self.limits, axis=self.limits.ndim - 1)
    mask = allowed(segments, limits, self.keys)
    return scores if mask is None else jnp.where(mask[:, None, None], scores, NEVER)
