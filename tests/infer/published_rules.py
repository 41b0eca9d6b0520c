"""Published decoding rules as plain loops in NumPy, one row at a time, from their own code.

Each takes the logits [W, V] of a window, what is masked bool[W], and returns what it writes bool[W].
The likeliest token is drawn. Scores are those of float32 softmax, given from outside, so that a
comparison does not hang on the last digit.
"""

import numpy as np


def dinfer_threshold(confidence, masked, threshold):
  """dInfer's get_transfer_index_threshold."""
  confidence = np.where(masked, confidence, -np.inf).astype(np.float32)
  bar = np.clip(confidence.max() - np.float32(1e-5), -1000, np.float32(threshold))
  return confidence >= bar


def runs_of(masked):
  """(start, end) of each run."""
  runs, start = [], None
  for place, value in enumerate([*masked, False]):
    if value and start is None:
      start = place
    if not value and start is not None:
      runs.append((start, place))
      start = None
  return runs


def dinfer_hierarchical(confidence, masked, threshold, low_threshold):
  """dInfer's get_transfer_index_hierarchy_fast_v2."""
  confidence = np.where(masked, confidence, -np.inf)
  chosen = np.zeros(len(masked), bool)
  if masked.any() and confidence.max() < low_threshold:
    chosen[confidence.argmax()] = True
    return chosen
  for start, end in runs_of(masked):
    chosen[start + confidence[start:end].argmax()] = True
  chosen &= confidence > low_threshold
  return chosen | (confidence > threshold)


def dinfer_remask(confidence, masked, written, threshold, low_threshold, remask_threshold):
  """dInfer's get_transfer_index_hierarchy_remask: (writes the drawn token, becomes MASK)."""
  doubt = (confidence < remask_threshold) & written
  open_ = masked | doubt
  confidence = np.where(open_, confidence, -np.inf)
  chosen = np.zeros(len(masked), bool)
  for start, end in runs_of(open_):
    chosen[start + confidence[start:end].argmax()] = True
  chosen &= confidence > low_threshold
  chosen |= confidence > threshold
  gap = doubt.sum() + 1 - chosen.sum()
  if gap > 0:
    rest = np.where(chosen, -np.inf, confidence)
    chosen[np.argsort(-rest, kind="stable")[:gap]] = True
  return chosen, doubt & ~chosen


def fast_dllm_threshold(confidence, masked, threshold):
  """Fast-dLLM's get_transfer_index with a threshold."""
  confidence = np.where(masked, confidence, -np.inf)
  order = np.argsort(-confidence, kind="stable")[: masked.sum()]
  chosen = np.zeros(len(masked), bool)
  chosen[order] = True
  for place in order[1:]:
    if confidence[place] < np.float32(threshold):
      chosen[place] = False
  return chosen


def fast_dllm_factor(confidence, masked, factor):
  """Fast-dLLM's get_transfer_index_dynamic, with its slip at the last position."""
  chosen = np.zeros(len(masked), bool)
  count = masked.sum()
  if not count:
    return chosen
  confidence = np.where(masked, confidence, -np.inf).astype(np.float32)
  order = np.argsort(-confidence, kind="stable")
  bars = [1 - factor / (n + 1) for n in range(1, count + 1)]
  bars[0] = -1
  for place in range(count):
    if confidence[order[place]] < np.float32(bars[place]):
      break
  if place in (0, count - 1):
    place += 1
  chosen[order[:place]] = True
  return chosen


def llada2_threshold(confidence, masked, threshold, least):
  """LLaDA2.0's and LLaDA2.1's generate: all above, or the `least` best where those are fewer."""
  confidence = np.where(masked, confidence, -np.inf)
  high = confidence > np.float32(threshold)
  if high.sum() >= least:
    return high
  chosen = np.zeros(len(masked), bool)
  chosen[np.argsort(-confidence, kind="stable")[: min(least, masked.sum())]] = True
  return chosen


def llada2_edit(confidence, drawn, tokens, masked, given, threshold):
  """LLaDA2.1's generate: which written tokens give way."""
  editable = ~masked & ~given
  high = np.where(editable, confidence, -np.inf) > np.float32(threshold)
  return high & editable & (drawn != tokens)


def dream_confidence(logits, kind):
  """Dream's sample_tokens at temperature 0: float32[W]."""
  e = np.exp(logits - logits.max(-1, keepdims=True))
  p = e / e.sum(-1, keepdims=True)
  ordered = np.sort(p, axis=-1)[:, ::-1]
  if kind == "topk_margin":
    return ordered[:, 0] - ordered[:, 1]
  if kind == "entropy":
    return (p * np.log(p + 1e-10)).sum(-1)
  return ordered[:, 0]


def dream_generate(network, tokens, mask_id, *, steps, kind, eps=1e-3):
  """Dream's _sample at temperature 0: every canvas of a row, first to last."""
  times = np.linspace(1, eps, steps + 1, dtype=np.float32)
  tokens = tokens.copy()
  canvases = [tokens.copy()]
  for i in range(steps):
    places = np.flatnonzero(tokens == mask_id)
    logits = network(tokens)[places]
    t, s = times[i], times[i + 1]
    count = int(np.float32(len(places)) * (1 - s / t)) if i < steps - 1 else len(places)
    if count > 0:
      confidence = dream_confidence(logits, kind)
      picked = np.argsort(-confidence, kind="stable")[:count]
      tokens[places[picked]] = logits.argmax(-1)[picked]
    canvases.append(tokens.copy())
  return canvases
