"""What becomes of the token that ends a text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lladax.infer.drawing import is_any, remove_ids


class EosPolicy:
  """What becomes of EOS. Subclasses are frozen dataclasses and state one of the two methods.

  Models fine-tuned with EOS padding write EOS early and everywhere when a whole answer is decoded
  at once; LLaDA evaluates some benchmarks with one or the other remedy (arXiv 2502.09992).
  """

  def logits(self, logits: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Logits [..., V] to draw from."""
    return logits

  def confidence(
    self, confidence: jax.Array, tokens: jax.Array, eos_ids: tuple[int, ...]
  ) -> jax.Array:
    """Confidence [...] of the tokens [...] drawn."""
    return confidence


@dataclasses.dataclass(frozen=True)
class KeepEos(EosPolicy):
  """EOS is a token like any other."""


@dataclasses.dataclass(frozen=True)
class NoEosLogits(EosPolicy):
  """EOS is never written (LLaDA's `logits_eos_inf`): every answer has the full length."""

  def logits(self, logits, eos_ids):
    return remove_ids(logits, eos_ids)


@dataclasses.dataclass(frozen=True)
class LowEosConfidence(EosPolicy):
  """EOS is written after everything else (LLaDA's `confidence_eos_eot_inf`).

  The confidence of a drawn EOS falls by 16, below that of every other token: a probability is at
  least 0, the lowest score of `Entropy` is -log V, above -16 for fewer than 8 million tokens. The
  reference sets it to -inf; the ranking is the same but for the order among EOS themselves, which
  there is undefined.
  """

  def confidence(self, confidence, tokens, eos_ids):
    return jnp.where(is_any(tokens, eos_ids), confidence - 16.0, confidence)
