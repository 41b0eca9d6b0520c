"""Iteration smoothing with every cache, against dInfer's loop in NumPy on a toy network.

Logits at p are a sum over all q of far[p - q] times the embedding at q; what the toy keeps of a column
is its embedding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_rules import dinfer_threshold

from lladax.infer import (
  DualCache,
  Engine,
  NoCache,
  PrefixCache,
  Request,
  SamplerConfig,
  Smoothing,
  Threshold,
  Vicinity,
  generate,
)
from lladax.models.cache import Memory, put_columns, take_columns

V, D, MASK, EOS, W, S = 12, 6, 11, 10, 4, 24
IDS = {"mask_id": MASK, "pad_id": EOS}
EMBED = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
FAR = np.random.default_rng(1).normal(size=(2 * S, V, D)).astype(np.float32)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]
SMOOTHING = Smoothing(weight=0.8, start=0.3, step=0.1, temperature=0.7)
CONFIG = SamplerConfig(
  gen_length=12, steps=12, block_length=W, smoothing=SMOOTHING,
  unmask=Threshold(0.4, start=1.0, decay=0.1),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Toy:
  """A `lladax.infer.Network`."""

  look_behind = 0

  def read(self, params, tokens, positions, segment_ids, *, at, width, soft=None, keep=False):
    seen = self._embedded(tokens, soft)
    return self._logits(seen, segment_ids, at, width), self._kept(seen) if keep else None

  def read_window(
    self, params, tokens, positions, segment_ids, *, at, width, memory, start, size,
    refresh, rows, soft,
  ):  # fmt: skip
    before = memory.layers[0][:, :, 0]
    old = take_columns(before, start, size)
    columns = start[:, None] + jnp.arange(size)
    inside = (columns >= refresh[0][:, None]) & (columns < refresh[1][:, None])
    new = take_columns(self._embedded(tokens, soft), start, size)
    seen = put_columns(before, jnp.where(inside[..., None], new, old), start)
    kept = jnp.where(rows[:, None, None], seen, before)
    return self._logits(seen, segment_ids, at, width), self._kept(kept)

  def prepare(self, positions):
    return positions

  def _kept(self, embedded):
    return Memory(None, (embedded[:, :, None],))

  def empty_memory(self, rows, length):
    return self._kept(jnp.zeros((rows, length, D)))

  def empty_soft(self, rows, length):
    return jnp.zeros((rows, length, D))

  def vocab_size(self, params, tokens, positions, segment_ids):
    return V

  def embed_softly(self, params, probabilities):
    return probabilities @ EMBED

  def _embedded(self, tokens, soft):
    return jnp.asarray(EMBED)[tokens] + soft

  def _logits(self, embedded, segment_ids, at, width):
    place = jnp.arange(embedded.shape[1])
    far = jnp.asarray(FAR)[place[:, None] - place + S]
    embedded = jnp.where((segment_ids != 0)[..., None], embedded, 0)
    logits = jnp.einsum("pqvd,bqd->bpv", far, embedded, precision=jax.lax.Precision.HIGHEST)
    return take_columns(logits, at, width)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def dinfer(prompt, cache):
  """IterationSmooth and IterSmoothWithVicinityCache, one iteration after the other."""
  tokens = np.array(prompt + [MASK] * CONFIG.gen_length)
  length, n, memory = len(tokens), 0, None
  embeds = EMBED[tokens].astype(np.float64)
  place = np.arange(length)
  far = FAR[place[:, None] - place + S].astype(np.float64)
  for start in range(len(prompt), length, W):
    block, first = slice(start, start + W), True
    while (tokens[block] == MASK).any():
      low, high = 0, length
      if not first and isinstance(cache, PrefixCache):
        low = start
      if not first and isinstance(cache, DualCache):
        low, high = start, start + W
      if not first and isinstance(cache, Vicinity) and n > cache.warmup:
        low, high = max(0, start - cache.before), min(length, start + W + cache.after)
      seen = embeds.copy() if memory is None else memory
      seen[low:high] = embeds[low:high]
      memory = None if isinstance(cache, NoCache) else seen
      logits = np.einsum("pqvd,qd->pv", far[low:high], seen)
      of_block = softmax(np.delete(logits[start - low : start - low + W], MASK, axis=1))
      masked = tokens[block] == MASK
      chosen = dinfer_threshold(of_block.max(-1), masked, max(1 - 0.1 * n, 0.4))
      tokens[block] = np.where(chosen, of_block.argmax(-1), tokens[block])
      weight = min(SMOOTHING.start + SMOOTHING.step * n, SMOOTHING.weight)
      mean = softmax(logits / SMOOTHING.temperature) @ EMBED
      still = (tokens[low:high] == MASK)[:, None]
      embeds[low:high] = EMBED[tokens[low:high]] + np.where(still, weight * mean, 0)
      n, first = n + 1, False
  return tokens.tolist(), n


@pytest.mark.parametrize(
  "cache", [NoCache(), PrefixCache(), DualCache(), Vicinity(before=2, after=3, warmup=2)]
)
def test_answers_are_those_of_dinfers_loop(cache):
  config = dataclasses.replace(CONFIG, cache=cache)
  result = generate(Toy(), 0, PROMPTS, config, eos_id=EOS, prompt_multiple=S, **IDS)
  for row, prompt in enumerate(PROMPTS):
    assert (result.row(row), result.nfe[row]) == dinfer(prompt, cache)


def test_a_slot_keeps_nothing_of_the_row_before():
  config = dataclasses.replace(CONFIG, cache=DualCache())
  engine = Engine(Toy(), 0, config, slots=1, length=S, eos_ids=EOS, **IDS)
  ticket = engine.add(Request(ids=PROMPTS[1]))
  engine.step()
  engine.cancel(ticket)
  engine.add(Request(ids=PROMPTS[0]))
  answer = []
  while not engine.free:
    (update,) = engine.step()
    answer += update.tokens
  assert PROMPTS[0] + answer == dinfer(PROMPTS[0], DualCache())[0]
