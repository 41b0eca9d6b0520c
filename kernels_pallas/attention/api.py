"""Bidirectional attention: signature, checks, derivative, and which implementation runs where."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import op
from kernels_pallas.attention import chunked, cudnn, reference, row_blocks, splash

IMPLEMENTATIONS = ("row_blocks", "chunked", "splash", "cudnn", "reference")


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  key_segment_ids: jax.Array | None = None,
  block_length: int | None = None,
  query_offset: int | jax.Array = 0,
  implementation: str | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v with a float32 softmax.

  Args:
    query: [B, L, N, H].
    key, value: [B, S, K, H]; K divides N, each key head serves N / K queries.
    segment_ids: int32[B, L] or None; a position attends within its own segment only. A query whose
      segment has no key that it may see gives 0, and no gradient.
    key_segment_ids: int32[B, S], the segments of the keys; None: those of the queries (S = L).
    block_length: None, or blocks of a block-causal mask: own block and earlier ones.
    query_offset: position of the first query among the keys, from 0, for `block_length`: one for
      all rows, or int32[B]. May be traced, for a shard of a sequence whose keys were gathered.
    implementation: one of `IMPLEMENTATIONS`; None chooses by the platform that is lowered for.
      `row_blocks`: CPU, a few rows of the batch at a time, or a part of a long one. `chunked`:
      anywhere, a few queries at a time. `splash`: TPU, with one offset for all rows. `cudnn`:
      NVIDIA, where this process finds cuDNN. `reference`: all scores at once. By default TPUs get
      `splash` from 128 queries and keys on and NVIDIA GPUs `cudnn`, where they take these operands;
      CPUs `row_blocks`; and everything else `chunked`. Of these only `reference` holds all scores
      at once.

  Returns:
    [B, L, N, H] in the dtype of `query`.

  Raises:
    ValueError: for operands that do not fit, an unknown implementation, or one that was named and
      cannot take them, with its reason. When lowered: one that was named and runs elsewhere.
  """
  _check(query, key, value, segment_ids, key_segment_ids, block_length, query_offset)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
  segments = limits = None
  if segment_ids is not None:
    segments = segment_ids, segment_ids if key_segment_ids is None else key_segment_ids
  if block_length is not None:
    position = jnp.asarray(query_offset, jnp.int32)[..., None] + jnp.arange(query.shape[1])
    limits = (position // block_length + 1) * block_length - 1  # [L] or [B, L]
  args = jax.tree.map(jnp.asarray, (query, key, value, segments, limits))
  args = op.vary_like(args, args)
  at_start = isinstance(query_offset, int) and query_offset == 0
  causal = block_length == 1 and at_start and query.shape[1] == key.shape[1]
  kernels = _choose(implementation, query, key, *args[3:], causal)
  out = reference.attention(*args) if kernels is None else _run(kernels, *args)
  if key_segment_ids is None:
    return out  # everybody sees at least itself
  # Without a key the softmax is over nothing. Zeros also stop the gradient there.
  alone = ~reference.allowed(*args[3:], key.shape[1]).any(-1)  # [B, L]
  return jnp.where(alone[..., None, None], 0, out)


def _check(query, key, value, segment_ids, key_segment_ids, block_length, query_offset):
  fits = query.ndim == key.ndim == 4 and key.shape == value.shape
  fits = fits and (query.shape[0], query.shape[3]) == (key.shape[0], key.shape[3])
  if not fits or query.shape[2] % key.shape[2]:
    raise ValueError(
      "expected query [B, L, N, H] and key, value [B, S, K, H] with K dividing N, got "
      f"{query.shape}, {key.shape} and {value.shape}"
    )
  if segment_ids is not None and segment_ids.shape != query.shape[:2]:
    raise ValueError(f"expected segment_ids {query.shape[:2]}, got {segment_ids.shape}")
  if key_segment_ids is not None:
    if segment_ids is None:
      raise ValueError("expected segment_ids of the queries beside key_segment_ids, got None")
    if key_segment_ids.shape != key.shape[:2]:
      raise ValueError(f"expected key_segment_ids {key.shape[:2]}, got {key_segment_ids.shape}")
  elif segment_ids is not None and key.shape[1] != query.shape[1]:
    raise ValueError(
      f"expected key_segment_ids {key.shape[:2]}, as there are {query.shape[1]} queries and "
      f"{key.shape[1]} keys; got None"
    )
  if block_length is not None and block_length < 1:
    raise ValueError(f"expected a block_length of at least 1, got {block_length}")
  if isinstance(query_offset, int) and query_offset < 0:
    raise ValueError(f"expected a query_offset of at least 0, got {query_offset}")
  if jnp.shape(query_offset) not in ((), query.shape[:1]):
    raise ValueError(
      f"expected one query_offset, or one for each of {query.shape[0]} rows, got "
      f"{jnp.shape(query_offset)}"
    )


@dataclasses.dataclass(frozen=True)
class _Kernels:
  """The names of what runs on each platform, and what cuDNN must be told."""

  cpu: str
  tpu: str
  cuda: str
  causal: bool


def _choose(implementation, query, key, segments, limits, causal) -> _Kernels | None:
  """None for the reference, which JAX differentiates."""
  refusals = {
    "splash": splash.refusal(query, key, limits),
    "cudnn": cudnn.refusal(query, key, segments, limits, causal),
  }
  if implementation == "reference":
    return None
  if implementation is not None:
    if reason := refusals.get(implementation):
      raise ValueError(
        f"{implementation!r} cannot run here: {reason}. Use another implementation ('chunked' "
        "takes everything) or None, which chooses"
      )
    return _Kernels(implementation, implementation, implementation, causal)
  on_tpu = refusals["splash"] is None and splash.worthwhile(query, key)
  return _Kernels(
    cpu="row_blocks",
    tpu="splash" if on_tpu else "chunked",
    cuda="chunked" if refusals["cudnn"] else "cudnn",
    causal=causal,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(kernels, query, key, value, segments, limits):
  return _run_fwd(kernels, query, key, value, segments, limits)[0]


def _run_fwd(kernels, *args):
  # By this name a policy of `jax.checkpoint` can keep them, and not run the kernel again.
  out, log_norm = checkpoint_name(_dispatch(kernels, "forward", *args), "attention")
  return out, (*args, out, log_norm)


def _run_bwd(kernels, residuals, grad):
  return (*_dispatch(kernels, "backward", *residuals, grad), None, None)


_run.defvjp(_run_fwd, _run_bwd)


def _dispatch(kernels, direction, *args):
  """`forward` or `backward` of what runs on the platform that is lowered for."""
  modules = {
    "row_blocks": (row_blocks, {}),
    "chunked": (chunked, {}),
    "splash": (splash, {"interpret": op.interpreted()}),
    "cudnn": (cudnn, {"causal": kernels.causal}),
  }

  def function(name):
    module, options = modules[name]
    return functools.partial(getattr(module, direction), **options)

  names = {"cpu": kernels.cpu, "tpu": kernels.tpu, "cuda": kernels.cuda}
  if len(set(names.values())) > 1:
    return op.by_platform(*args, **{platform: function(name) for platform, name in names.items()})
  name = kernels.cpu
  platform = {"splash": "tpu", "cudnn": "cuda"}.get(name)
  return op.only_on(platform, name, function(name), *args) if platform else function(name)(*args)
