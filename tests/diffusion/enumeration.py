"""A toy network with a known answer: random logits for every noisy text, and its exact bound.

Four tokens from a vocabulary of three and MASK: 256 noisy texts, 16 maskings of each clean one, so
every expectation of the diffusion package can be summed instead of sampled.
"""

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np

LENGTH, MASK, VOCABULARY = 4, 3, 4
TABLE = np.random.default_rng(7).normal(size=((MASK + 1) ** LENGTH, LENGTH, VOCABULARY)) * 1.5
TABLE = TABLE.astype(np.float32)


def denoise(tokens):
  code = sum(tokens[..., i] * (MASK + 1) ** i for i in range(LENGTH))
  return jnp.asarray(TABLE)[code]


@functools.cache
def masked_ce(text, masked) -> float:
  """Sum over masked positions of the cross-entropy, in float64."""
  return sum(ce_at(text, masked, place) for place in range(LENGTH) if masked[place])


def maskings(maskable):
  """All maskings of the maskable positions, as tuples of bools."""
  return itertools.product(*[(False, True) if m else (False,) for m in maskable])


def expected_ce(text, maskable, rate: float) -> float:
  """E of the masked cross-entropy when each maskable token is masked with probability `rate`."""
  total = 0.0
  for masked in maskings(maskable):
    n, m = sum(masked), sum(maskable)
    total += rate**n * (1 - rate) ** (m - n) * masked_ce(text, masked)
  return total


def negative_bound(text, maskable) -> float:
  """The integral over rates p of E[masked ce] / p, by the beta function for each masking."""
  m = sum(maskable)
  return sum(
    masked_ce(text, masked) / (sum(masked) * math.comb(m, sum(masked)))
    for masked in maskings(maskable)
    if any(masked)
  )


def order_log_probs(text, maskable) -> np.ndarray:
  """log p(text) under each order of writing the maskable tokens one at a time."""
  places = [i for i in range(LENGTH) if maskable[i]]
  result = []
  for order in itertools.permutations(places):
    total = 0.0
    for done, place in enumerate(order):
      before = [i in order[done:] for i in range(LENGTH)]
      total -= ce_at(text, before, place)
    result.append(total)
  return np.array(result)


def ce_at(text, masked, place) -> float:
  noisy = [MASK if hidden else token for token, hidden in zip(text, masked, strict=True)]
  logits = TABLE[sum(token * (MASK + 1) ** i for i, token in enumerate(noisy))][place]
  logits = logits.astype(np.float64)
  return float(np.log(np.exp(logits).sum()) - logits[text[place]])
