"""Iteration smoothing: a masked position is fed what was predicted there (dInfer, arXiv 2510.08666)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoothing:
  """Embedding of a position still masked at iteration n + 1: E[MASK] + w_n softmax(z_n / tau) E.

  w_n = min(start + step * n, weight), n counting the iterations of the row over all its blocks. So it
  is wherever iteration n computed logits: on the whole canvas where that is read, else in the window
  of the cache. A mask outside keeps what was predicted there last, as in dInfer's code. A network
  with block-causal attention, of which dInfer smooths none, is smoothed in its block alone.

  The logits of all columns that are read are computed for it, and softmax(z) E costs 2 V D operations
  for each of them, as much as the logits.

  Attributes:
    weight: the largest weight (dInfer's `cont_weight`).
    start, step: see above (dInfer's code).
    temperature: tau.

  Raises:
    ValueError: for a negative number, or a temperature that is not positive.
  """

  weight: float = 0.3
  start: float = 0.15
  step: float = 0.02
  temperature: float = 1.0

  def __post_init__(self):
    for name in ("weight", "start", "step"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name} is at least 0; got {getattr(self, name)}")
    if not self.temperature > 0:
      raise ValueError(f"temperature of the smoothing is above 0; got {self.temperature}")

  def at(self, iteration: jax.Array) -> jax.Array:
    """w_n, float32[B], of iterations int32[B]."""
    return jnp.minimum(self.start + self.step * iteration, self.weight).astype(jnp.float32)

  def probabilities(self, logits: jax.Array) -> jax.Array:
    """softmax(z / tau) of [B, W, V], the network's own logits, float32."""
    return jax.nn.softmax(logits.astype(jnp.float32) / self.temperature, axis=-1)
