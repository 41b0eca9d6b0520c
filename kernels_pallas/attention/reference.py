"""Attention, the meaning: softmax over allowed keys in float32, scores written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(query, key, value, segment_ids=None, block_length=None) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over the keys that `allowed` admits; see `api.attention`."""
  B, L, N, H = query.shape
  K = key.shape[2]
  query = (query * H**-0.5).reshape(B, L, K, N // K, H)
  scores = jnp.einsum("blkgh,bskh->bkgls", query, key, preferred_element_type=jnp.float32)
  mask = allowed(L, segment_ids, block_length)
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bkgls,bskh->blkgh", probabilities, value).reshape(B, L, N, H)


def allowed(length: int, segment_ids=None, block_length=None) -> jax.Array | None:
  """bool[B or 1, L, L] over (query, key); None where everything is allowed."""
  mask = None
  if segment_ids is not None:
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
  if block_length is not None:
    block = jnp.arange(length) // block_length
    causal = (block[:, None] >= block[None, :])[None]
    mask = causal if mask is None else mask & causal
  return mask
