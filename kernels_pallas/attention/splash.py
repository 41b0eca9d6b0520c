"""Attention on TPUs by JAX's splash attention kernels; scores never leave the chip.

Full attention and segment ids are the kernels' own. The limits of block-causal masks go in as the
positions of its causal form, computed, not tabulated, so that they may depend on the device (a
shard of a sequence); blocks of scores beyond them are neither fetched nor computed. Scores between
documents of a packed row are computed and then masked. Lengths that blocks do not divide are
padded, and the limits hide the padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 128
LARGEST_BLOCK = 1024


def refusal(query, key, limits=None) -> str | None:
  """Why the kernels cannot take these operands; None if they can."""
  if limits is not None and limits.ndim == 2:
    return "its limits are the same for all rows, not those of an offset per row"
  if query.dtype not in (jnp.bfloat16, jnp.float32) or key.dtype != query.dtype:
    return f"it takes bfloat16 or float32, not {query.dtype} and {key.dtype}"
  return None


def worthwhile(query, key) -> bool:
  """Whether a block of queries and one of keys are not mostly padding."""
  return min(query.shape[1], key.shape[1]) >= LANES


def forward(query, key, value, segments=None, limits=None, *, interpret=False):
  """-> (out [B, L, N, H], log of the softmax norm float32[B, N, L])."""
  L, S = query.shape[1], key.shape[1]
  sizes = block_length(L), block_length(S)
  infos, settings = _masks(L, S, limits, sizes, interpret)
  operands = _operands(query, key, value, segments, sizes)
  kernel = _library().SplashAttentionKernel(*infos, save_residuals=True, **settings)
  axes = (0, 0, 0, None if segments is None else 0)
  out, (log_norm,) = jax.vmap(kernel, in_axes=axes)(*operands)
  return jnp.swapaxes(out, 1, 2)[:, :L], log_norm[..., :L]


def backward(query, key, value, segments, limits, out, log_norm, grad, *, interpret=False):
  """Gradients of query, key and value."""
  L, S = query.shape[1], key.shape[1]
  sizes = block_length(L), block_length(S)
  (_, *infos), settings = _masks(L, S, limits, sizes, interpret)
  *operands, ids = _operands(query, key, value, segments, sizes)
  out, grad = (_heads_first(x, sizes[0]) for x in (out, grad))
  log_norm = _padded(log_norm, 2, sizes[0])
  settings = dict(save_residuals=False, **settings)

  def row(query, key, value, ids, out, log_norm, grad):
    # The kernels' own backward pass, called by its name: their `custom_vjp` would have to run the
    # forward pass a second time to get there.
    residuals = query, key, value, ids, None, out, log_norm, *infos
    return _library()._splash_attention_bwd(**settings, res=residuals, do=grad)[3:6]

  axes = (0, 0, 0, None if segments is None else 0, 0, 0, 0)
  dquery, dkey, dvalue = jax.vmap(row, in_axes=axes)(*operands, ids, out, log_norm, grad)
  dquery = dquery * query.shape[-1] ** -0.5
  grads = (dquery, L, query.dtype), (dkey, S, key.dtype), (dvalue, S, value.dtype)
  return tuple(jnp.swapaxes(g, 1, 2)[:, :n].astype(dtype) for g, n, dtype in grads)


def block_length(length: int) -> int:
  """How many queries, or keys, a block has: a multiple of 128, at most 1024.

  A block of b queries reads every key once: b multiplications per byte of bfloat16. A chip needs
  some 170 (v5p) to 560 (v6e) to be busy, hence blocks as large as its memory takes; a block of
  1024 x 1024 float32 scores is 4 MiB, a few of which fit. Among those the padding decides; a block
  is taken to cost as much again as 64 rows (not measured).
  """
  blocks = range(LANES, LARGEST_BLOCK + 1, LANES)
  return min(blocks, key=lambda block: -(-length // block) * (block + 64))


def _library():
  # Importing it takes more than a second.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

  return splash_attention_kernel


def _masks(L, S, limits, sizes, interpret):
  """Which blocks each of the three kernels visits, and the settings they share."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

  block_q, block_kv = sizes
  queries, keys = -(-L // block_q), -(-S // block_kv)
  if limits is None and S % block_kv:
    limits = jnp.full(L, S - 1, jnp.int32)
  if limits is None:
    none = splash_attention_mask_info.MaskInfo(None, None, None, None, None)
    infos = none, none, none
  else:
    limits = jnp.minimum(limits, S - 1).astype(jnp.int32)
    limits = jnp.pad(limits, (0, queries * block_q - L), mode="edge")
    i, j = jnp.arange(queries)[:, None], jnp.arange(keys)[None]
    live = j * block_kv <= limits[block_q - 1 :: block_q, None]  # limits never fall
    first = jnp.minimum((~live).sum(0), queries - 1)  # to see keys j: all after it do
    # What the step reads where it does not compute: what a later one needs anyhow.
    keys_next, queries_next = jnp.where(live, j, 0), jnp.maximum(i, first)

    def info(step):
      step, state = (x.astype(jnp.int32)[None] for x in (step, live))
      return splash_attention_mask_info.MaskInfo(step, None, state, None, limits)

    infos = info(keys_next), info(keys_next), info(queries_next)
  # The scores of half a large block at a time: products can run beside the other's exponentials.
  compute = block_kv // 2 if block_kv % (2 * LANES) == 0 and block_kv > 512 else block_kv
  blocks = _library().BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_kv_compute=compute,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=compute,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  return infos, {
    "mask_value": _library().DEFAULT_MASK_VALUE,
    "is_mqa": False,
    "block_sizes": blocks,
    "residual_checkpoint_name": None,
    "mask_function": None if limits is None else _within,
    "attn_logits_soft_cap": None,
    "interpret": interpret,
  }


def _within(limit, key):
  return key <= limit


def _operands(query, key, value, segments, sizes):
  block_q, block_kv = sizes
  query = _heads_first(query * query.shape[-1] ** -0.5, block_q)
  key, value = (_heads_first(x, block_kv) for x in (key, value))
  if segments is not None:
    padded = (_padded(ids, 1, size) for ids, size in zip(segments, sizes, strict=True))
    segments = _library().SegmentIds(*padded)
  return query, key, value, segments


def _heads_first(x, block):
  """[B, L, N, H] -> [B, N, L and padding, H]."""
  return _padded(jnp.swapaxes(x, 1, 2), 2, block)


def _padded(x, axis, block):
  return jnp.pad(x, [(0, -x.shape[a] % block if a == axis else 0) for a in range(x.ndim)])
