"""The network as a sampler calls it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lladax.models.attention import AttentionMask, segments
from lladax.models.cache import MEMORY_AXES, KeyValues, Memory, Place, take_columns
from lladax.models.config import ModelConfig
from lladax.models.layers import RotaryPositions
from lladax.models.transformer import Transformer, rotary_positions
from lladax.sharding import constrain
from lladax.types import Logits, Positions, SegmentIds, Tokens


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """The network as a sampler calls it: (params, tokens, positions, segment_ids) -> logits.

  Equal denoisers are equal values, so that a jitted sampler compiles once for all of them.

  Attributes:
    config: of the model.
    block_length: of a block-causal mask, as LLaDA2 has it (arXiv 2512.15745); None: everybody
      attends to everybody.
  """

  config: ModelConfig
  block_length: int | None = None

  def __call__(self, params, tokens, positions, segment_ids) -> Logits:
    mask = dataclasses.replace(segments(segment_ids), block_length=self.block_length)
    logits, _ = Transformer(self.config).apply(
      {"params": params}, tokens, positions=positions, mask=mask
    )
    return logits

  @property
  def look_behind(self) -> int:
    """How many columns before the first one of a window its logits are read from."""
    return int(self.config.shift)

  def read(
    self,
    params,
    tokens: Tokens,
    positions: Positions | RotaryPositions,
    segment_ids: SegmentIds,
    *,
    at: jax.Array,
    width: int,
    soft: jax.Array | None = None,
    keep: bool = False,
  ) -> tuple[Logits, Memory | None]:
    """A pass over the whole canvas.

    Args:
      params: of the model.
      tokens, positions, segment_ids: int32[B, S]; positions may be `prepare`d.
      at: int32[B], the first column of each row whose logits are wanted.
      width: W, how many of them.
      soft: [B, S, D], added to the embeddings.
      keep: whether keys and values are kept.

    Returns:
      float32 logits [B, W, V]; the memory, None unless kept.
    """
    return self._read(
      params,
      tokens,
      positions=positions,
      mask=dataclasses.replace(segments(segment_ids), block_length=self.block_length),
      at=at,
      width=width,
      soft=soft,
      place=Place() if keep else None,
    )

  def read_window(
    self,
    params,
    tokens: Tokens,
    positions: Positions | RotaryPositions,
    segment_ids: SegmentIds,
    *,
    at: jax.Array,
    width: int,
    memory: Memory,
    start: jax.Array,
    size: int,
    refresh: tuple[jax.Array, jax.Array] | None = None,
    rows: jax.Array | None = None,
    soft: jax.Array | None = None,
  ) -> tuple[Logits, Memory]:
    """A pass over `size` columns of each row; the others' keys and values are those in memory.

    Args:
      memory: from an earlier pass.
      start: int32[B], the first of the columns; start + size is at most S.
      refresh: int32[B] each, [first, end): of the columns of the pass, those whose memory changes;
        None: all.
      rows: bool[B] or None: the rows that are read. Of the others the logits mean nothing, and the
        memory stays what it is.
      The rest as for `read`.

    Returns:
      float32 logits [B, W, V] and the memory with the new columns.
    """
    return self._read(
      params,
      take_columns(tokens, start, size),
      positions=jax.tree.map(lambda x: take_columns(x, start, size), positions),
      mask=AttentionMask(
        segment_ids=take_columns(segment_ids, start, size),
        key_segment_ids=segment_ids,
        first=start,
        block_length=self.block_length,
      ),  # fmt: skip
      at=at - start,
      width=width,
      soft=None if soft is None else take_columns(soft, start, size),
      memory=memory,
      place=Place(start, *(refresh or (None, None)), rows),
    )

  def prepare(self, positions: Positions) -> RotaryPositions:
    """Positions for many passes over them, by `read` and `read_window`."""
    return rotary_positions(self.config, positions)

  def empty_memory(self, rows: int, length: int) -> Memory:
    """Room for the keys and values of a canvas [B, S]; on a mesh by rows and heads.

    n layers take 4 n B S K H bytes in bfloat16.
    """
    return _empty_memory(self.config, rows, length)

  def vocab_size(self, params, tokens, positions, segment_ids) -> int:
    """V, of the logits."""
    return self.config.vocab_size

  def empty_soft(self, rows: int, length: int) -> jax.Array:
    """Zeros [B, S, D], nothing to be added to embeddings; on a mesh by rows."""
    return _empty_soft(self.config, rows, length)

  def embed_softly(self, params, probabilities: jax.Array) -> jax.Array:
    """float32[B, W, V] -> [B, W, D]: the mean embedding under distributions over tokens."""
    return Transformer(self.config).apply({"params": params}, probabilities, method="embed_softly")

  def _read(self, params, tokens, **more):
    return Transformer(self.config).apply({"params": params}, tokens, **more, method="read")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_soft(config: ModelConfig, rows: int, length: int) -> jax.Array:
  zeros = jnp.zeros((rows, length, config.hidden_size), config.dtype)
  return constrain(zeros, "batch", None, None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_memory(config: ModelConfig, rows: int, length: int) -> Memory:
  def empty(*lead):
    zeros = jnp.zeros((*lead, rows, length, config.kv_heads, config.head_size), config.dtype)
    axes = [None] * len(lead)
    return KeyValues(*(constrain(zeros, *axes, *MEMORY_AXES) for _ in range(2)))

  def of_layers(count: int):
    if not count:
      return None
    return empty(count) if config.stacked else tuple(empty() for _ in range(count))

  return Memory(of_layers(config.num_dense_layers), of_layers(config.num_routed_layers))
