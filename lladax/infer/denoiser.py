"""From the network to the logits that tokens are drawn from: guidance, MASK removed, EOS policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lladax.infer.canvas import Canvas, window
from lladax.infer.drawing import draw_tokens as draw_tokens
from lladax.infer.drawing import is_any, remove_ids
from lladax.infer.drawing import token_probability as token_probability
from lladax.types import BoolPerToken, Logits, Positions, SegmentIds, Tokens

# (params, tokens, positions, segment_ids) -> logits float32[B, L, V]; position i predicts token i.
# It is a static argument of jitted functions: hashable, and equal from call to call (a function of
# a module, a frozen dataclass with __call__), because a fresh lambda per call would compile anew.
# `params` is any pytree and is traced.
DenoiseFn = Callable[[object, Tokens, Positions, SegmentIds], Logits]


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

  The confidence of a drawn EOS falls by 1, below that of every other token. The reference sets it
  to -inf; the ranking is the same but for the order among EOS themselves, which there is undefined.
  """

  def confidence(self, confidence, tokens, eos_ids):
    return jnp.where(is_any(tokens, eos_ids), confidence - 1.0, confidence)


def guided_logits(
  denoise: DenoiseFn,
  params: object,
  canvas: Canvas,
  given: BoolPerToken,
  column: int | jax.Array,
  width: int,
  *,
  cfg_scale: float,
  mask_id: int,
) -> jax.Array:
  """Logits float32[B, W, V] of the window, with classifier-free guidance and MASK removed.

  Guidance is unsupervised (SMDM, arXiv 2410.18514): a second pass sees MASK in place of what was
  `given`, and logits = un + (cfg_scale + 1) (cond - un). Both passes are one call on 2B rows.
  MASK is removed last, since -inf minus -inf is not a number.

  Args:
    given: bool[B, L], tokens that the canvas started with.
    column, width: the window, columns [column, column + width); `column` may be traced.
  """
  tokens, positions, segment_ids = canvas.tokens, canvas.positions, canvas.segment_ids
  if cfg_scale:
    tokens = jnp.concatenate([tokens, jnp.where(given, mask_id, tokens)])  # [2B, L]
    positions, segment_ids = (jnp.concatenate([x, x]) for x in (positions, segment_ids))
  logits = window(denoise(params, tokens, positions, segment_ids), column, width)
  logits = logits.astype(jnp.float32)
  if cfg_scale:
    cond, un = jnp.split(logits, 2)
    logits = un + (cfg_scale + 1.0) * (cond - un)
  return remove_ids(logits, (mask_id,))
