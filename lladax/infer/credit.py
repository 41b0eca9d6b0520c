"""Credit: what the network has kept saying of a position counts for more than its last word.

CreditDecoding (arXiv 2510.06133), with the constants of dInfer's code (arXiv 2510.08666).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kernels_pallas.argmax import argmax


@dataclasses.dataclass(frozen=True)
class Credit:
  """Logits + alpha log(1 + C), where C gathers the probability of past likeliest tokens.

  In every iteration C falls to beta C, and at masked positions the likeliest token gains
  p ** gamma. dInfer's code has 0.7, 0.2 and 0.8, the paper 0.65, 0.2 and 0.7. `Credit.adaptive()`
  is the paper's variant without them.

  Attributes:
    alpha: weight in the logits; None for the share of the window that is written.
    gamma: exponent of the probability; below 1 it lifts small ones.
    beta: what is left of the credit after an iteration, up to 1; None as for alpha.
  """

  alpha: float | None = 0.7
  gamma: float = 0.2
  beta: float | None = 0.8

  def __post_init__(self):
    for name, most in (("alpha", math.inf), ("gamma", math.inf), ("beta", 1.0)):
      value = getattr(self, name)
      if value is None and name != "gamma":
        continue
      if not (math.isfinite(value) and 0.0 <= value <= most):
        span = "is a finite number of at least 0" if most > 1 else "lies between 0 and 1"
        raise ValueError(f"{name} of Credit {span}; got {value}")

  @classmethod
  def adaptive(cls) -> Credit:
    """gamma 1, alpha = beta = 1 - the share of the window that is masked."""
    return cls(alpha=None, gamma=1.0, beta=None)

  def init(self, rows: int, width: int, vocabulary: int) -> jax.Array:
    """The credit float32[B, W, V] of a block before its first iteration: none."""
    return jnp.zeros((rows, width, vocabulary), jnp.float32)

  def __call__(
    self, state: jax.Array, logits: jax.Array, masked: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(logits with credit, the new credit), both float32[B, W, V].

    Args:
      state: float32[B, W, V], the credit so far.
      logits: float32[B, W, V], as the network gave them.
      masked: bool[B, W]; only these gain credit.
    """
    written = 1.0 - jnp.mean(masked, axis=1, dtype=jnp.float32)[:, None, None]
    alpha, beta = (written if rate is None else rate for rate in (self.alpha, self.beta))
    likeliest = argmax(logits)[..., None]  # [B, W, 1]
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    gain = jnp.exp(self.gamma * (jnp.max(logits, axis=-1, keepdims=True) - total))
    gains = masked[..., None] & (jnp.arange(logits.shape[-1]) == likeliest)
    state = beta * state + jnp.where(gains, gain, 0.0)
    return logits + alpha * jnp.log1p(state), state
