"""Attention on NVIDIA GPUs by cuDNN's flash kernels, through `jax.nn.dot_product_attention`.

cuDNN knows full and causal attention. Other masks it takes as a bias on the scores, one for all
heads: L * S numbers of 2 bytes per row of the batch, and as many for the bias's gradient, which it
always writes. So rows go one after another, as many at once as keep a bias within `BIAS_BYTES`,
and a single row whose bias is larger is refused. (cuDNN can also take packed documents as offsets
and lengths, without a bias, but JAX has no public door to that.)

JAX offers the two passes only as one differentiable function, so backward the forward kernel runs
again: two products more than the backward pass's five.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.reference import allowed

BIAS_BYTES = 1 << 28


def refusal(query, key, segments, limits, causal: bool) -> str | None:
  """Why cuDNN cannot take these operands here; None if it can."""
  L, S, H = query.shape[1], key.shape[1], query.shape[3]
  if missing := _missing():
    return missing
  if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
    return f"it takes bfloat16 or float16, not {query.dtype} and {key.dtype}"
  if H % 8 or H > 128:
    return f"it takes heads of at most 128 numbers, a multiple of 8, not {H}"
  if needs_bias(segments, limits, causal):
    if L % 2 or S % 2:
      return f"with a mask it takes even lengths, not {L} and {S}"
    if 2 * L * S > BIAS_BYTES:
      return f"the mask of one row would take {2 * L * S} bytes, more than {BIAS_BYTES}"
  return None


@functools.cache
def _missing() -> str | None:
  """What this process lacks to use cuDNN: JAX looks for it while it traces."""
  x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
  try:
    jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
  except (RuntimeError, NotImplementedError) as error:
    return str(error)
  return None


def needs_bias(segments, limits, causal: bool) -> bool:
  return segments is not None or (limits is not None and not causal)


def forward(query, key, value, segments, limits, *, causal):
  """-> (out [B, L, N, H], zeros float32[B, N, L] in place of the norm, which cuDNN keeps)."""
  B, L, N, _ = query.shape
  biased = needs_bias(segments, limits, causal)
  limits, own_limits = _by_row(limits)

  def rows(query, key, value, segments, own_limits):
    own = limits if own_limits is None else own_limits
    return _attend(query, key, value, segments, own, causal)

  out = _map_rows(rows, biased, query, key, value, segments, own_limits)
  return out, jnp.zeros((B, N, L), jnp.float32)


def backward(query, key, value, segments, limits, out, log_norm, grad, *, causal):
  """Gradients of query, key and value."""
  del out, log_norm
  biased = needs_bias(segments, limits, causal)
  limits, own_limits = _by_row(limits)

  def rows(query, key, value, grad, segments, own_limits):
    own = limits if own_limits is None else own_limits
    run = functools.partial(_attend, segments=segments, limits=own, causal=causal)
    return jax.vjp(run, query, key, value)[1](grad)

  return _map_rows(rows, biased, query, key, value, grad, segments, own_limits)


def _by_row(limits):
  """(limits that all rows share, limits of each row); one of them is None."""
  return (None, limits) if limits is not None and limits.ndim == 2 else (limits, None)


def _attend(query, key, value, segments, limits, causal):
  mask = None
  if needs_bias(segments, limits, causal):
    mask = allowed(segments, limits, key.shape[1])[:, None]
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, is_causal=causal and mask is None, implementation="cudnn"
  )


def _map_rows(f, biased, query, key, *args):
  """`f` on as many rows of the batch at once as `BIAS_BYTES` allows."""
  B, L, S = *query.shape[:2], key.shape[1]
  rows = max(1, min(B, BIAS_BYTES // (2 * L * S))) if biased else B
  while B % rows:
    rows -= 1
  args = query, key, *args
  if rows == B:
    return f(*args)
  blocks = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), args)
  out = lax.map(lambda block: f(*block), blocks)
  return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), out)
