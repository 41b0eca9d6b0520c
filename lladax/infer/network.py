"""The network as the decoding loop calls it: a few columns' logits, and memory between passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from lladax.models.cache import Memory, take_columns
from lladax.types import Logits, Positions, SegmentIds, Tokens

# (params, tokens, positions, segment_ids) -> logits float32[B, L, V]; position i predicts token i.
# It is a static argument of jitted functions: hashable, and equal from call to call (a function of
# a module, a frozen dataclass with __call__), because a fresh lambda per call would compile anew.
# `params` is any pytree and is traced.
DenoiseFn = Callable[[object, Tokens, Positions, SegmentIds], Logits]


class Network(Protocol):
  """What `lladax.models.Denoiser` is, where everything is documented. Hashable, as a `DenoiseFn`."""

  # How many columns before a window's first one its logits are read from.
  look_behind: int

  def read(
    self, params, tokens, positions, segment_ids, *, at, width, soft=None, keep=False
  ) -> tuple[Logits, Memory | None]:
    """A pass over the whole canvas: logits [B, width, V] of the columns from at_r on; memory."""

  def read_window(
    self, params, tokens, positions, segment_ids, *, at, width, memory, start, size,
    refresh=None, rows=None, soft=None,
  ) -> tuple[Logits, Memory]:  # fmt: skip
    """A pass over `size` columns of each row, the others' keys and values from memory."""

  def prepare(self, positions) -> Any:
    """Of positions int32[B, S] what `read` and `read_window` take in their place: a tree of
    [B, S, ...], made once for all passes of a block."""

  def empty_memory(self, rows: int, length: int) -> Memory:
    """What is kept of a canvas [B, S] before its first pass."""

  def vocab_size(self, params, tokens, positions, segment_ids) -> int:
    """V, of the logits."""

  def embed_softly(self, params, probabilities) -> jax.Array:
    """[B, W, V] -> [B, W, D]: the mean embedding under distributions over tokens."""

  def empty_soft(self, rows: int, length: int) -> jax.Array:
    """[B, S, D], nothing to be added to the embeddings of a canvas."""


@dataclasses.dataclass(frozen=True)
class Whole:
  """A `DenoiseFn` as a network: the whole canvas in every pass, no memory."""

  denoise: DenoiseFn
  look_behind = 0

  def read(self, params, tokens, positions, segment_ids, *, at, width, soft=None, keep=False):
    if keep or soft is not None:
      raise ValueError(
        f"{self.denoise!r} is a plain function of tokens: it keeps no keys and values and has no "
        "embeddings; use cache=NoCache() and smoothing=None, or a lladax.models.Denoiser"
      )
    return take_columns(self.denoise(params, tokens, positions, segment_ids), at, width), None

  def prepare(self, positions):
    return positions

  def vocab_size(self, params, tokens, positions, segment_ids) -> int:
    return jax.eval_shape(self.denoise, params, tokens, positions, segment_ids).shape[-1]


def as_network(denoise: DenoiseFn | Network) -> Network:
  return denoise if hasattr(denoise, "read") else Whole(denoise)
