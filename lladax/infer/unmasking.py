"""Unmasking rules: which of the masked positions are written in this iteration.

A rule sees confidences, what is still masked and a budget, and knows nothing of the network, the
cache or the text.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp


class Unmask(abc.ABC):
  """Chooses positions to commit. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def __call__(
    self, confidence: jax.Array, masked: jax.Array, budget: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Positions to write now.

    Args:
      confidence: float32[B, W], of the token drawn at each position of the window: usually its
        probability. An EOS policy may lower it below 0.
      masked: bool[B, W], what is still to be written.
      budget: int32[B], how many the schedule of steps asks for; a rule may choose otherwise.
      key: [B] keys, one per row, for rules that draw.

    Returns:
      bool[B, W], within `masked`, each row a function of its own arguments only. At least one
      position of a row that has any and whose budget is positive.
    """


@dataclasses.dataclass(frozen=True)
class LowConfidence(Unmask):
  """The `budget` most confident (LLaDA's low-confidence remasking, arXiv 2502.09992).

  Among equals the lowest position.
  """

  def __call__(self, confidence, masked, budget, key):
    return best(confidence, masked, budget)


@dataclasses.dataclass(frozen=True)
class Random(Unmask):
  """`budget` positions uniformly at random (LLaDA's random remasking)."""

  def __call__(self, confidence, masked, budget, key):
    def draw(row_key, column):
      # A key per column: what a column draws does not depend on how wide the window is.
      return jax.random.uniform(jax.random.fold_in(row_key, column))

    columns = jnp.arange(masked.shape[1])
    scores = jax.vmap(jax.vmap(draw, in_axes=(None, 0)), in_axes=(0, None))(key, columns)
    return best(scores, masked, budget)


def best(score: jax.Array, masked: jax.Array, count: jax.Array) -> jax.Array:
  """The `count` highest scores among `masked`, ties to the lowest position. bool[B, W]."""
  # Two keys and not a score of -inf for what is not masked: a masked position may score -inf.
  order = jnp.lexsort((-score, ~masked), axis=-1)  # stable: equal keys keep their order
  rank = jnp.argsort(order, axis=-1)
  return masked & (rank < count[:, None])
