"""A toy network for the decoding tests: random tables, float32, deaf to padding.

The logits at a position depend on every token of its row and how far away it is, so what is written
matters to what comes next, and a wrong position or a leak from padding shows.
"""

import jax.numpy as jnp
import numpy as np

VOCABULARY, MASK, EOS, PAD = 16, 15, 14, 14
PARAMS = {
  "own": np.random.default_rng(0).normal(size=(64, VOCABULARY, VOCABULARY)).astype(np.float32),
  "far": np.random.default_rng(1).normal(size=(128, VOCABULARY, VOCABULARY)).astype(np.float32),
}
trace_count = [0]


def toy_denoise(params, tokens, positions, segment_ids):
  """Logits[p] = own[p mod 64, x_p] + sum over q of far[p - q + 64, x_q] in whole numbers / 256.

  Whole numbers add up exactly in any order, so that a row's logits are the same to the last bit in
  every batch, width and implementation.
  """
  trace_count[0] += 1
  own, far = (jnp.round(params[name] * 64) for name in ("own", "far"))
  real = segment_ids != 0
  distance = jnp.clip(positions[:, :, None] - positions[:, None, :] + 64, 0, 127)  # [B, L, L]
  from_far = far[distance, tokens[:, None, :]]  # [B, L, L, V]
  from_far = jnp.sum(jnp.where(real[:, None, :, None], from_far, 0.0), axis=2)
  return (own[positions % 64, tokens] * 2 + from_far) / 256


def numpy_denoise(tokens: np.ndarray) -> np.ndarray:
  """The same for one row without padding, as loops: [L] -> float32[L, V]."""
  own, far = (np.round(PARAMS[name] * 64) for name in ("own", "far"))
  logits = np.zeros((len(tokens), VOCABULARY), np.float32)
  for p in range(len(tokens)):
    logits[p] = own[p % 64, tokens[p]] * 2
    for q in range(len(tokens)):
      logits[p] += far[min(max(p - q + 64, 0), 127), tokens[q]]
  return logits / 256
