"""Axis letters, array aliases and the two structures that travel between packages.

One legend for signatures, comments, einsum strings and docstrings:

  B batch        L length        S cache length    D model width
  N query heads  K kv heads      H head dim        F feed-forward width
  V vocabulary   E experts       k experts per token (num_experts_per_tok)
  T = B * L tokens               n layers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

import jax
import jax.numpy as jnp
from flax import struct

Tokens = Annotated[jax.Array, "int32[B, L]"]
Positions = Annotated[jax.Array, "int32[B, L]"]
SegmentIds = Annotated[jax.Array, "int32[B, L], 0 is padding"]
Logits = Annotated[jax.Array, "float32[B, L, V]"]
PerToken = Annotated[jax.Array, "float32[B, L]"]
BoolPerToken = Annotated[jax.Array, "bool[B, L]"]
PerExample = Annotated[jax.Array, "float32[B]"]
Scalar = Annotated[jax.Array, "float32[]"]


@struct.dataclass
class Batch:
  """Clean text, as the data pipeline gives it: noise is added on the device, inside the step.

  Attributes:
    tokens: int32[B, L].
    segment_ids: int32[B, L]. Documents packed into a row count from 1; 0 is padding. Attention
      stays within a segment.
    positions: int32[B, L]. Rotary position, counted from 0 within each segment.
    maskable: bool[B, L]. Where noise may fall and the loss counts: all text in pre-training, the
      response only in fine-tuning, never padding.
  """

  tokens: Tokens
  segment_ids: SegmentIds
  positions: Positions
  maskable: BoolPerToken


@struct.dataclass
class RowGroups:
  """To which group each row of a batch belongs, for statistics by group.

  Attributes:
    index: int32[B], below `count`.
    count: the number of groups, static.
  """

  index: jax.Array
  count: int = struct.field(pytree_node=False)

  def one_hot(self) -> jax.Array:
    """float32[B, count]."""
    return (self.index[:, None] == jnp.arange(self.count)).astype(jnp.float32)

  def of_tokens(self, length: int) -> RowGroups:
    """The groups of the B * length tokens of the rows."""
    return RowGroups(jnp.repeat(self.index, length), self.count)


@struct.dataclass
class Sums:
  """Numerators and denominators by name: added over microbatches and hosts, divided once.

  `Sums` of two halves of a batch add up to the `Sums` of the batch, so a mean does not depend on
  how the batch was split.
  """

  sums: dict[str, jax.Array]
  counts: dict[str, jax.Array]

  def __add__(self, other: Sums) -> Sums:
    return jax.tree.map(jnp.add, self, other)

  def means(self) -> dict[str, jax.Array]:
    """Sum over count by name; 0 where nothing was counted."""
    return {
      name: jnp.where(self.counts[name] > 0, total / jnp.maximum(self.counts[name], 1e-30), 0.0)
      for name, total in self.sums.items()
    }


class Denoise(Protocol):
  """The network as the sampler sees it: noisy tokens in, logits for every position out.

  Position i predicts token i. Everything else that a network needs (parameters, positions,
  segments) is bound by whoever makes the closure.
  """

  def __call__(self, tokens: Tokens) -> Logits: ...


# (noisy tokens, target tokens, weights) -> (sum of weights * nll, nll where weights != 0, aux).
# The network as the objective sees it. It returns losses and not logits, so that no [T, V] array
# need exist; `lladax.diffusion.objective.nll_from_logits` makes one of a plain `Denoise`.
TokenNll = Callable[[Tokens, Tokens, PerToken], tuple[Scalar, PerToken, object]]
