"""Bidirectional attention and its masks: full, padding, segments, block-causal."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.attention import attention
from lladax.models.config import ModelConfig, dtype_of
from lladax.models.layers import Projection, RMSNorm, rotate
from lladax.sharding import over_batch_shards
from lladax.types import BoolPerToken, SegmentIds


@struct.dataclass
class AttentionMask:
  """Who may attend to whom, as structure rather than as an [L, L] array.

  Attributes:
    segment_ids: int32[B, L] or None. A position attends within its own segment only; padding is
      a segment (0) of its own, so that no row of the softmax is empty.
    block_length: None, or the length of the blocks of a block-causal mask: a position attends to
      its own block and to earlier ones. 1 is causal attention.
  """

  segment_ids: SegmentIds | None = None
  block_length: int | None = struct.field(pytree_node=False, default=None)

  def valid(self) -> BoolPerToken | None:
    """bool[B, L], False on padding; None where there is none."""
    return None if self.segment_ids is None else self.segment_ids > 0


def full() -> AttentionMask:
  """Everybody attends to everybody."""
  return AttentionMask()


def padding(valid: BoolPerToken) -> AttentionMask:
  """Real tokens attend to all real tokens. valid: bool[B, L], True on real tokens."""
  return AttentionMask(segment_ids=valid.astype(jnp.int32))


def segments(segment_ids: SegmentIds) -> AttentionMask:
  """Attention within packed documents. segment_ids: int32[B, L], 0 is padding."""
  return AttentionMask(segment_ids=segment_ids)


def block_causal(block_length: int, segment_ids: SegmentIds | None = None) -> AttentionMask:
  """Bidirectional within a block, causal between blocks (LLaDA2.0, arXiv 2512.15745).

  Blocks are counted from the start of the row.

  Raises:
    ValueError: if block_length is below 1.
  """
  if block_length < 1:
    raise ValueError(f"block_length must be at least 1, got {block_length}")
  return AttentionMask(segment_ids=segment_ids, block_length=block_length)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask) -> jax.Array:
  """Attention of [B, L, heads, H] under `mask`, each device computing its rows of the batch."""

  def local(query, key, value, *segment_ids):
    return attention(query, key, value, *segment_ids, block_length=mask.block_length)

  args = (query, key, value)
  if mask.segment_ids is not None:
    args = (*args, mask.segment_ids)
  return over_batch_shards(local, sharded=(True,) * len(args))(*args)


class Attention(nn.Module):
  """Multi-head attention with per-head QK-norm before rotary, as LLaDA-MoE has it.

  `rotary`: cos and sin of `rotary_tables`.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, rotary: tuple, mask: AttentionMask) -> jax.Array:
    config = self.config
    N, K, H = config.num_attention_heads, config.kv_heads, config.head_size
    shared = {
      "initializer_range": config.initializer_range,
      "param_dtype": dtype_of(config.param_dtype),
    }

    def project(name, heads, axis):
      axes = ("embed", axis, "head_dim")
      return Projection((heads, H), axes, use_bias=config.attention_bias, name=name, **shared)(x)

    query = project("query", N, "heads")  # [B, L, N, H]
    key = project("key", K, "kv_heads")  # [B, L, K, H]
    value = project("value", K, "kv_heads")
    if config.qk_norm:
      query = RMSNorm(config.rms_norm_eps, name="query_norm")(query)
      key = RMSNorm(config.rms_norm_eps, name="key_norm")(key)
    out = attend(rotate(query, *rotary), rotate(key, *rotary), value, mask)
    axes = ("heads", "head_dim", "embed")
    return Projection((x.shape[-1],), axes, inputs=2, name="out", **shared)(out)
