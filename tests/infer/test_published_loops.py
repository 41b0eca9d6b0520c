"""Whole answers by the published rules, against their loops in NumPy on the same toy network.

tests/infer/test_dinfer_rules.py compares one decision at a time; here the decisions follow each
other, with the numbers of passes, the count of iterations over blocks, credit and edits.
"""

import functools

import numpy as np
import published_rules as published
import pytest
import toy_denoise as toy

from lladax.infer import (
  Credit,
  EditTokens,
  Factor,
  Hierarchical,
  SamplerConfig,
  Threshold,
  ThresholdOrBudget,
  generate,
)

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
GEN, BLOCK = 16, 8
SHARPER = 3.0


def sharp(params, tokens, positions, segment_ids):
  """The toy network, surer of itself, so that rules that go by confidence write several at once."""
  return SHARPER * toy.toy_denoise(params, tokens, positions, segment_ids)


def predict(tokens, credit=None, masked=None):
  """What is drawn, and its probability, at every position: ([L], float32[L])."""
  logits = SHARPER * toy.numpy_denoise(tokens).astype(np.float64)
  if credit is not None:
    logits = credit(logits, masked)
  logits[:, toy.MASK] = -np.inf
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return p.argmax(-1), p.max(-1).astype(np.float32)


def dinfer_credit(alpha, gamma, beta):
  """dInfer's _apply_credit_fusion for one block."""
  matrix = 0.0

  def fuse(logits, masked):
    nonlocal matrix
    matrix = matrix * beta + np.zeros_like(logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for place in np.flatnonzero(masked):
      top = p[place].argmax()
      matrix[place, top] += p[place, top] ** gamma
    return logits + alpha * np.log(matrix + 1)

  return fuse


def numpy_decode(prompt, choose, *, credit=None, edit=None, extra_steps=0):
  """Block after block until no mask is left: (tokens, passes, edits).

  `choose` takes (confidence, masked, iteration of the row); `edit` is LLaDA2.1's threshold.
  """
  tokens = np.array([*prompt, *[toy.MASK] * GEN])
  passes = edits = 0
  for start in range(len(prompt), len(tokens), BLOCK):
    block, post = slice(start, start + BLOCK), 0
    fuse = dinfer_credit(*credit) if credit else None
    while True:
      masked = np.zeros(len(tokens), bool)
      masked[block] = tokens[block] == toy.MASK
      if not masked.any():
        post += 1
        if edit is None or post > extra_steps:
          break
      drawn, confidence = predict(tokens, fuse, masked)
      chosen = np.zeros(BLOCK, bool)
      if masked.any():
        chosen = choose(confidence[block], masked[block], passes)
      passes += 1
      changed = np.zeros(BLOCK, bool)
      if edit is not None:
        window = confidence[block], drawn[block], tokens[block], masked[block]
        changed = published.llada2_edit(*window, np.zeros(BLOCK, bool), edit)
        edits += changed.sum()
      tokens[block] = np.where(chosen | changed, drawn[block], tokens[block])
      if not masked.any() and not changed.any():
        break
  return tokens.tolist(), passes, edits


def threshold(bar):
  return lambda confidence, masked, n: published.dinfer_threshold(confidence, masked, bar)


def factor(confidence, masked, n):
  """Fast-dLLM's, but where its slip writes a last position that fails."""
  chosen = published.fast_dllm_factor(confidence, masked, 1.2)
  last = np.where(masked, confidence, np.inf).argmin()
  fails = masked.sum() > 1 and confidence[last] < 1 - 1.2 / (masked.sum() + 1)
  return chosen & ~((np.arange(BLOCK) == last) & (chosen == masked).all() & fails)


CASES = {
  "threshold": (Threshold(0.6), threshold(0.6), {}),
  "threshold that falls": (
    Threshold(0.4, start=1.0, decay=0.1),
    lambda c, m, n: published.dinfer_threshold(c, m, max(1 - 0.1 * n, 0.4)),
    {},
  ),
  "hierarchical": (
    Hierarchical(0.7, 0.3),
    lambda c, m, n: published.dinfer_hierarchical(c, m, 0.7, 0.3),
    {},
  ),
  "factor": (Factor(1.2), factor, {}),
  "credit": (Threshold(0.8), threshold(0.8), {"credit": (0.7, 0.2, 0.8)}),
  "editing": (
    ThresholdOrBudget(0.6),
    lambda c, m, n: published.llada2_threshold(c, m, 0.6, 1),
    {"edit": 0.5, "extra_steps": 3},
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_and_passes_are_those_of_the_published_loop(name):
  rule, choose, options = CASES[name]
  config = SamplerConfig(
    gen_length=GEN,
    steps=GEN,
    block_length=BLOCK,
    unmask=rule,
    credit=Credit(*options["credit"]) if "credit" in options else None,
    edit=EditTokens(options["edit"], options["extra_steps"]) if "edit" in options else None,
  )
  run = functools.partial(generate, sharp, toy.PARAMS, PROMPTS, config)
  result = run(mask_id=toy.MASK, eos_id=toy.EOS, pad_id=toy.PAD, prompt_multiple=8)
  edited = 0
  for row, prompt in enumerate(PROMPTS):
    tokens, passes, edits = numpy_decode(prompt, choose, **options)
    assert result.row(row) == tokens
    assert result.nfe[row] == passes
    edited += edits
  assert (edited > 0) == ("edit" in options)
  assert (result.nfe != GEN).any()  # the rule makes a difference
