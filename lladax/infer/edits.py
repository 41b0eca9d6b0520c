"""Edits: rules that change what was written before, by another token or back to MASK.

They run after the unmasking rule, on its choice, and never see a token that was given.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from lladax.infer.unmasking import best


class Edit(abc.ABC):
  """Changes written tokens. Subclasses are frozen dataclasses.

  Attributes:
    extra_steps: iterations that a block may go on for after no mask is left in it. A row ends them
      early in the first iteration that changes nothing.
  """

  extra_steps: int = 0

  @abc.abstractmethod
  def __call__(
    self,
    *,
    tokens: jax.Array,
    drawn: jax.Array,
    confidence: jax.Array,
    probability: jax.Array,
    masked: jax.Array,
    commit: jax.Array,
    editable: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What to write, to replace and to mask again.

    Args:
      tokens: int32[B, W], the window before this iteration.
      drawn: int32[B, W], the tokens drawn in this iteration, at every position.
      confidence: float32[B, W], of `drawn`.
      probability: float32[B, W], of `tokens`; 0 at masks.
      masked: bool[B, W], before this iteration.
      commit: bool[B, W], within `masked`, what the unmasking rule writes.
      editable: bool[B, W], what was written in an earlier iteration: neither masked nor given.

    Returns:
      (commit, replace, remask), bool[B, W]: masks that get the token drawn, written tokens that
      are replaced by the one drawn, written tokens that become MASK. The first holds at least what
      it was and lies within `masked`, the others are disjoint and within `editable`. As long as a
      row has masks, their number falls in every iteration in which `commit` has any.
    """


@dataclasses.dataclass(frozen=True)
class EditTokens(Edit):
  """A written token gives way to another one whose probability exceeds the threshold.

  LLaDA2.1's token-to-token editing (arXiv 2602.08676).

  Attributes:
    threshold: to be exceeded. 0.9 in the published sampler.
    extra_steps: iterations after no mask is left, at most. 16 there.
  """

  threshold: float = 0.9
  extra_steps: int = 16

  def __post_init__(self):
    check_threshold(self)
    if self.extra_steps < 0:
      raise ValueError(f"extra_steps is at least 0; got {self.extra_steps}")

  def __call__(self, *, tokens, drawn, confidence, probability, masked, commit, editable):
    replace = editable & ~masked & (drawn != tokens) & (confidence > self.threshold)
    return commit, replace, jnp.zeros_like(replace)


@dataclasses.dataclass(frozen=True)
class RemaskLow(Edit):
  """A written token becomes MASK again where even the likeliest one is below the threshold.

  The remasking variant of dInfer's hierarchical decoder (arXiv 2510.08666). For n tokens in doubt
  at least n + 1 are written, if need be by the most confident of all that are masked or in doubt,
  so masks fall by at least one in every iteration; one in doubt that is among them gets the token
  drawn instead. dInfer takes the runs of masks with those in doubt as masks, here the rule sees
  the masks alone; where the two do not touch that is the same.

  Attributes:
    threshold: tokens in doubt have less. 0.4 in dInfer's code.
  """

  threshold: float = 0.4

  def __post_init__(self):
    check_threshold(self)

  def __call__(self, *, tokens, drawn, confidence, probability, masked, commit, editable):
    unfinished = jnp.any(masked, axis=1, keepdims=True)
    doubt = editable & ~masked & (confidence < self.threshold) & unfinished
    missing = count(doubt) + 1 - count(commit)
    forced = best(confidence, (masked | doubt) & ~commit, jnp.maximum(missing, 0))
    forced &= unfinished
    return commit | (forced & masked), forced & doubt, doubt & ~forced


def count(chosen: jax.Array) -> jax.Array:
  return jnp.sum(chosen, axis=1, dtype=jnp.int32)


def check_threshold(edit) -> None:
  if not 0.0 <= edit.threshold <= 1.0:
    raise ValueError(
      f"threshold of {type(edit).__name__} lies between 0 and 1; got {edit.threshold}"
    )
