"""Bidirectional attention and its masks: full, padding, segments, block-causal."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.attention import attention
from lladax.models.cache import MEMORY_AXES, Columns, KeyValues, Place, insert
from lladax.models.config import ModelConfig, dtype_of
from lladax.models.layers import Projection, RMSNorm, rotate
from lladax.sharding import constrain, joined, on_devices, spec
from lladax.types import BoolPerToken, SegmentIds


@struct.dataclass
class AttentionMask:
  """Who may attend to whom, as structure rather than as an [L, L] array.

  Attributes:
    segment_ids: int32[B, L] or None. A position attends within its own segment only; padding is
      a segment (0) of its own, so that no row of the softmax is empty.
    key_segment_ids: int32[B, S], of what may be attended to, where that is more than the columns
      of this pass; None: the same columns.
    block_length: None, or the length of the blocks of a block-causal mask: a position attends to
      its own block and to earlier ones. 1 is causal attention.
    first: int32[B], which of the keys' columns the first one of this pass is, for `block_length`;
      None: the first.
  """

  segment_ids: SegmentIds | None = None
  key_segment_ids: SegmentIds | None = None
  first: jax.Array | None = None
  block_length: int | None = struct.field(pytree_node=False, default=None)

  def valid(self) -> BoolPerToken | None:
    """bool[B, L], False on padding; None where there is none."""
    return None if self.segment_ids is None else self.segment_ids > 0

  def asked_by(self, wanted: Columns) -> AttentionMask:
    """The same where only these columns of the pass ask."""
    ids, keys = self.segment_ids, self.key_segment_ids
    first = wanted.start if self.first is None else self.first + wanted.start
    return AttentionMask(
      segment_ids=None if ids is None else wanted.take(ids),
      key_segment_ids=ids if keys is None else keys,
      first=None if self.block_length is None else first,
      block_length=self.block_length,
    )


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
  """Attention of [B, L, heads, H] under `mask`, each device computing its rows and heads.

  Where the sequence is split over the context axis, sequence and heads change places for the
  softmax: a device then has some heads of the whole sequence (Ulysses, arXiv 2309.14509). With c
  devices that moves 4 / c of the activations, where gathering keys and values would move 2.

  Raises:
    ValueError: if the heads do not divide over the tensor and context axes; for keys of more columns
      than the queries' on a mesh that splits the sequence.
  """
  axes = ("batch", "length", "heads", None)
  of_query, of_key = spec(query.shape, *axes), spec(key.shape, *axes)
  of_ids = joined(*of_query[:2])
  heads, kv_heads = query.shape[2], key.shape[2]
  if of_query[2] != of_key[2]:
    raise ValueError(
      f"{kv_heads} key heads do not divide over the mesh's tensor axis as {heads} heads do; "
      f"choose a tensor axis that divides {kv_heads}"
    )
  context = of_query[1]  # the axis, or None
  of_keys_ids = joined(*of_key[:2])
  if mask.key_segment_ids is not None and (context or of_key[1]):
    raise ValueError(
      "keys from memory are not split over a context axis; decode on a mesh with context=1"
    )

  more = {
    "segment_ids": (mask.segment_ids, of_ids),
    "key_segment_ids": (mask.key_segment_ids, of_keys_ids),
    "query_offset": (mask.first, joined(*of_query[:1])),
  }
  more = {name: pair for name, pair in more.items() if pair[0] is not None}

  def local(query, key, value, *rest):
    rest = dict(zip(more, rest, strict=True))
    if context:
      query, key, value = _heads_for_length(context, query, key, value)
      rest = {
        name: jax.lax.all_gather(ids, context, axis=1, tiled=True) for name, ids in rest.items()
      }
    out = attention(query, key, value, **rest, block_length=mask.block_length)
    if context:
      out = jax.lax.all_to_all(out, context, split_axis=1, concat_axis=2, tiled=True)
    return out

  args, specs = zip(*more.values(), strict=True) if more else ((), ())
  specs = (of_query, of_key, of_key, *specs)
  return on_devices(local, specs, of_query, query, key, value, *args)


def _heads_for_length(axis: str, query, key, value):
  """[B, L / c, heads, H] -> [B, L, heads / c, H] over the c devices of an axis of the mesh."""
  devices = jax.lax.axis_size(axis)
  heads, kv_heads = query.shape[2], key.shape[2]
  # Each key head as often as it takes for the devices to share them equally.
  copies = devices // math.gcd(kv_heads, devices)
  if heads % (kv_heads * copies):
    raise ValueError(
      f"a device's {heads} heads with {kv_heads} key heads do not divide over the {devices} devices "
      "of the context axis; choose a smaller one, or a smaller tensor axis"
    )
  key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
  return (
    jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    for x in (query, key, value)
  )


class Attention(nn.Module):
  """Multi-head attention with per-head QK-norm before rotary, as LLaDA-MoE has it.

  `rotary`: cos and sin of `rotary_tables`. With a `place` keys and values are returned too: of these
  columns, or with `memory`, where those of the other columns are read, of all of them. With `wanted`
  only these columns ask, and the result is [B, W, D]; all of them are still looked at.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    rotary: tuple,
    mask: AttentionMask,
    memory: KeyValues | None = None,
    place: Place | None = None,
    wanted: Columns | None = None,
  ) -> tuple[jax.Array, KeyValues | None]:
    config = self.config
    N, K, H = config.num_attention_heads, config.kv_heads, config.head_size
    shared = {
      "initializer_range": config.initializer_range,
      "param_dtype": dtype_of(config.param_dtype),
    }

    def project(name, x, heads, axis):
      axes = ("embed", axis, "head_dim")
      return Projection((heads, H), axes, use_bias=config.attention_bias, name=name, **shared)(x)

    asking, turn = (x, rotary) if wanted is None else (wanted.take(x), map(wanted.take, rotary))
    query = project("query", asking, N, "heads")  # [B, L, N, H]
    key = project("key", x, K, "kv_heads")  # [B, L, K, H]
    value = project("value", x, K, "kv_heads")
    if config.qk_norm:
      norm = functools.partial(RMSNorm, config.rms_norm_eps, ("batch", "length", "heads", None))
      query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
    kept = KeyValues(rotate(key, *rotary), value)
    if place is not None:
      # The few new columns are brought together, not the memory that they are put into.
      kept = jax.tree.map(lambda x: constrain(x, *MEMORY_AXES), kept)
    if memory is not None:
      kept = insert(memory, kept, place)
    mask = mask if wanted is None else mask.asked_by(wanted)
    out = attend(rotate(query, *turn), kept.key, kept.value, mask)
    axes = ("heads", "head_dim", "embed")
    out = Projection((x.shape[-1],), axes, inputs=2, name="out", **shared)(out)
    return out, None if place is None else kept
