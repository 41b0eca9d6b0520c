"""Bidirectional attention: signature, checks, derivative, and which implementation runs where."""

from __future__ import annotations

import functools

import jax
from jax import lax

from kernels_pallas.attention import reference, row_blocks

IMPLEMENTATIONS = ("row_blocks", "reference")


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  block_length: int | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v with a float32 softmax.

  Args:
    query: [B, L, N, H].
    key, value: [B, L, K, H]; K divides N, each key head serves N / K queries.
    segment_ids: int32[B, L] or None; a position attends within its own segment only.
    block_length: None, or blocks of a block-causal mask: own block and earlier ones.
    implementation: one of `IMPLEMENTATIONS`; None: `row_blocks` where lowered for a CPU,
      `reference` elsewhere.

  Returns:
    [B, L, N, H] in the dtype of `query`.

  Raises:
    ValueError: for shapes that do not fit or an unknown implementation.
  """
  fits = query.ndim == key.ndim == 4 and key.shape == value.shape
  fits = fits and (*query.shape[:2], query.shape[3]) == (*key.shape[:2], key.shape[3])
  if not fits or query.shape[2] % key.shape[2]:
    raise ValueError(
      "expected query [B, L, N, H] and key, value [B, L, K, H] with K dividing N, got "
      f"{query.shape}, {key.shape} and {value.shape}"
    )
  if segment_ids is not None and segment_ids.shape != query.shape[:2]:
    raise ValueError(f"expected segment_ids {query.shape[:2]}, got {segment_ids.shape}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
  args = (query, key, value) if segment_ids is None else (query, key, value, segment_ids)
  plain = functools.partial(_plain, block_length)
  rows = functools.partial(_row_blocks, block_length)
  if implementation is None:
    return _by_platform(block_length, *args)
  return (rows if implementation == "row_blocks" else plain)(*args)


def _plain(block_length, query, key, value, ids=None):
  return reference.attention(query, key, value, ids, block_length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_blocks(block_length, query, key, value, ids=None):
  return row_blocks.forward(query, key, value, ids, block_length)[0]


def _row_blocks_fwd(block_length, query, key, value, ids=None):
  out, log_norm = row_blocks.forward(query, key, value, ids, block_length)
  return out, (query, key, value, out, log_norm, ids)


def _row_blocks_bwd(block_length, residuals, grad):
  *saved, ids = residuals
  grads = row_blocks.backward(*saved, grad, ids, block_length)
  return (*grads, None)


_row_blocks.defvjp(_row_blocks_fwd, _row_blocks_bwd)


def _by_platform(block_length, *args):
  return lax.platform_dependent(
    *args,
    cpu=functools.partial(_row_blocks, block_length),
    default=functools.partial(_plain, block_length),
  )
