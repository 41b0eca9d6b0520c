"""Attention, the meaning: softmax over allowed keys in float32, scores written out.

Who may attend to whom is given to every implementation as two things, either of which may be None:
`segments`, the ids of queries int32[B, L] and of keys int32[B, S], which must be equal; `limits`,
int32[L] or, where rows differ, int32[B, L], the last key that each query may see, never falling.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Of scores that do not count. Finite, so that a row without a key has a softmax (of no meaning).
NEVER = jnp.finfo(jnp.float32).min


def attention(query, key, value, segments=None, limits=None) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over the keys that `allowed` admits; see `api.attention`."""
  B, L, N, H = query.shape
  S, K = key.shape[1:3]
  query = (query * H**-0.5).reshape(B, L, K, N // K, H)
  scores = jnp.einsum("blkgh,bskh->bkgls", query, key, preferred_element_type=jnp.float32)
  mask = allowed(segments, limits, S)
  if mask is not None:
    scores = jnp.where(mask[:, None, None], scores, NEVER)
  probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bkgls,bskh->blkgh", probabilities, value).reshape(B, L, N, H)


def allowed(segments, limits, keys: int) -> jax.Array | None:
  """bool[B or 1, L, S] over (query, key); None where everything is allowed."""
  mask = None
  if segments is not None:
    mask = segments[0][:, :, None] == segments[1][:, None, :]
  if limits is not None:
    early = jnp.arange(keys) <= limits[..., None]
    early = early if limits.ndim == 2 else early[None]
    mask = early if mask is None else mask & early
  return mask
