"""Cache policies: in which iterations the whole canvas is read, and which columns in the others.

The mechanics are in `lladax.models.cache`. With bidirectional attention the keys and values of one
token depend on all tokens, so what is kept is old as soon as something is written; the policies
differ in how much they read anew, and how often.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp


class Cache(abc.ABC):
  """Subclasses are frozen dataclasses."""

  # Whether keys and values are kept at all.
  keeps = True
  # Whether all rows that are in their block's same iteration read the same.
  uniform = True
  # Whether the first window of a block begins with the block before it, which is finished by then:
  # what is kept of that one are the keys and values of its final tokens.
  settles = False

  @abc.abstractmethod
  def whole(self, in_block: jax.Array, in_row: jax.Array) -> jax.Array:
    """Which rows read the whole canvas now: bool[B].

    Args:
      in_block: int32[], the iteration in the block, from 0.
      in_row: int32[B], the iteration of the row since its start.
    """

  def window(self, width: int, rest: int) -> tuple[int, int]:
    """What is read otherwise: this many columns before the block, and this many in all.

    Args:
      width: W, of the block.
      rest: at least the columns from any row's block to the end of what it writes.
    """
    return 0, width


@dataclasses.dataclass(frozen=True)
class NoCache(Cache):
  """The whole canvas in every iteration, as LLaDA does (arXiv 2502.09992)."""

  keeps = False

  def whole(self, in_block, in_row):
    return jnp.ones(in_row.shape, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixCache(Cache):
  """What is before the block is kept; block and suffix are read (Fast-dLLM, arXiv 2505.22618).

  Attributes:
    refresh_every: the whole canvas is read in every such iteration of a block; None: in its first
      one only.
  """

  refresh_every: int | None = None

  def __post_init__(self):
    _check_refresh(self.refresh_every)

  def whole(self, in_block, in_row):
    return jnp.full(in_row.shape, _due(in_block, self.refresh_every))

  def window(self, width, rest):
    return 0, rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualCache(Cache):
  """What is before and after the block is kept (Fast-dLLM's dual cache, arXiv 2505.22618).

  Attributes:
    refresh_every: as for `PrefixCache`; dInfer's `cache_update_freq`.
  """

  refresh_every: int | None = None

  def __post_init__(self):
    _check_refresh(self.refresh_every)

  def whole(self, in_block, in_row):
    return jnp.full(in_row.shape, _due(in_block, self.refresh_every))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vicinity(Cache):
  """A dual cache that reads the block's neighbourhood anew as well (dInfer's vicinity refresh).

  Attributes:
    before, after: columns of the neighbourhood, clipped to the canvas (dInfer: 16 and 16).
    warmup: in this many first iterations of a row the whole canvas is read (dInfer: 4). The first
      iteration after them, and the first one of each block, read it once more.
  """

  before: int = 16
  after: int = 16
  warmup: int = 4
  uniform = False

  def __post_init__(self):
    for name in ("before", "after", "warmup"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} is at least 0; got {getattr(self, name)}")

  def whole(self, in_block, in_row):
    return (in_row <= self.warmup) | (in_block == 0)

  def window(self, width, rest):
    return self.before, self.before + width + self.after


@dataclasses.dataclass(frozen=True)
class BlockCausal(Cache):
  """Exact, for a network whose attention is block-causal (LLaDA2, arXiv 2512.15745).

  The prompt is read in the first iteration. Later blocks see a finished block's final tokens, so it
  is read once more, in one pass with the first iteration of the next block, as in dInfer. Nothing
  else changes what earlier blocks are.
  """

  uniform = False
  settles = True

  def whole(self, in_block, in_row):
    return in_row == 0


def _due(iteration, every: int | None) -> jax.Array:
  return iteration == 0 if every is None else iteration % every == 0


def _check_refresh(every: int | None):
  if every is not None and every < 1:
    raise ValueError(f"refresh_every is at least 1, or None for once per block; got {every}")
