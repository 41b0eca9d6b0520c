"""How many positions of a block each of its steps asks for."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp


class StepSchedule(abc.ABC):
  """The budget of an iteration. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def __call__(
    self, at_start: jax.Array, left: jax.Array, iteration: jax.Array | int, steps: int
  ) -> jax.Array:
    """Positions that each row should write now.

    Args:
      at_start: int32[B], masks of the block before its first iteration.
      left: int32[B], masks left.
      iteration: int32[], or [B] where rows differ; of the block, from 0.
      steps: the iterations over which the block is spread.

    Returns:
      int32[B], or float32[B] where the number is an expectation: rules that count drop the
      fraction. Between 0 and `left`; all of `left` from the last step on.
    """


@dataclasses.dataclass(frozen=True)
class EqualShares(StepSchedule):
  """masks // steps, the remainder going to the first iterations (LLaDA, arXiv 2502.09992).

  In the last step all that is left is the same number for a rule that has kept to its budget.
  """

  def __call__(self, at_start, left, iteration, steps):
    share = at_start // steps + (iteration < at_start % steps)
    return jnp.where(iteration >= steps - 1, left, jnp.minimum(share, left))


@dataclasses.dataclass(frozen=True)
class LinearTime(StepSchedule):
  """left * (1 - s/t), where time falls from t to s in equal steps from 1 to eps (Dream, 2508.15487).

  With as many steps as masks the whole number of it is 0 in the first step and 1 in later ones, so
  the last step has more to write than the others: Dream's own behaviour, kept as it is.
  """

  eps: float = 1e-3

  def __post_init__(self):
    if not 0.0 <= self.eps < 1.0:
      raise ValueError(f"eps, where time ends, lies between 0 and 1; got {self.eps}")

  def __call__(self, at_start, left, iteration, steps):
    # t = 1 - i (1 - eps) / steps, so 1 - s/t is this, without the rounding of a difference.
    fall = 1.0 - self.eps
    share = fall / (steps - fall * jnp.clip(iteration, 0, steps - 1))
    return jnp.where(iteration >= steps - 1, left.astype(jnp.float32), left * share)
