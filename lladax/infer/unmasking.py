"""Unmasking rules: which of the masked positions are written in this iteration.

A rule sees confidences, what is still masked and a budget, and knows nothing of the network, the
cache or the text.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

from lladax.infer.drawing import token_probability


class Unmask(abc.ABC):
  """Chooses positions to commit. Subclasses are frozen dataclasses."""

  def score(self, logits: jax.Array, drawn: jax.Array) -> jax.Array:
    """The confidence float32[B, W] that the rule goes by: the probability of the token drawn.

    Args:
      logits: float32[B, W, V], before temperature, top-k, top-p and noise, which are for drawing
        and would leak into it; -inf at what is never written.
      drawn: int32[B, W], the tokens drawn.
    """
    return token_probability(logits, drawn)

  @abc.abstractmethod
  def __call__(
    self,
    confidence: jax.Array,
    masked: jax.Array,
    budget: jax.Array,
    key: jax.Array,
    iteration: jax.Array,
  ) -> jax.Array:
    """Positions to write now.

    Args:
      confidence: float32[B, W], the `score` of each position of the window. An EOS policy may have
        lowered it.
      masked: bool[B, W], what is still to be written.
      budget: int32[B] or float32[B], how many the schedule of steps asks for (`StepSchedule`); a
        rule that counts drops the fraction, and a rule may choose otherwise.
      key: [B] keys, of the row and iteration, for rules that draw.
      iteration: int32[B], of the row since its start, over all blocks, from 0.

    Returns:
      bool[B, W], within `masked`, each row a function of its own arguments only. At least one
      position of a row that has any, if its budget is at least 1; rules that say so whatever the
      budget.
    """


@dataclasses.dataclass(frozen=True)
class LowConfidence(Unmask):
  """The `budget` most confident (LLaDA's low-confidence remasking, arXiv 2502.09992).

  Among equals the lowest position.

  Attributes:
    alg_temp: above 0, positions are drawn instead: one after the other without replacement, each
      with probability softmax(confidence / alg_temp) (Dream's maskgit_plus, arXiv 2508.15487).
  """

  alg_temp: float = 0.0

  def __post_init__(self):
    check_temperature(self.alg_temp)

  def __call__(self, confidence, masked, budget, key, iteration):
    return best(perturbed(confidence, self.alg_temp, key), masked, budget)


@dataclasses.dataclass(frozen=True)
class Margin(LowConfidence):
  """The `budget` with the widest margin: the likeliest token's probability less the second's.

  Dream's topk_margin (arXiv 2508.15487), which measures it after temperature and top-p; here it is
  the model's own distribution, so that temperature does not decide what is written first.
  """

  def score(self, logits, drawn):
    first, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(first - total) - jnp.exp(second - total)


@dataclasses.dataclass(frozen=True)
class Entropy(LowConfidence):
  """The `budget` of lowest entropy: confidence is sum p log p, at most 0 (Dream's entropy).

  Like `Margin` it is measured on the model's own distribution; Dream (arXiv 2508.15487) measures it
  after temperature and top-p, and as sum p log(p + 1e-10).
  """

  def score(self, logits, drawn):
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


@dataclasses.dataclass(frozen=True)
class Random(Unmask):
  """`budget` positions uniformly at random (LLaDA's random remasking)."""

  def __call__(self, confidence, masked, budget, key, iteration):
    return best(uniform(key, masked.shape[1]), masked, budget)


@dataclasses.dataclass(frozen=True)
class Origin(Unmask):
  """Each masked position for itself, with probability budget / masks (Dream's origin, 2508.15487).

  With `LinearTime` steps that is Dream's 1 - s/t, and 1 in the last step. Where nobody is drawn,
  Dream spends a pass that writes nothing; here one position, each as likely, is written.
  """

  def __call__(self, confidence, masked, budget, key, iteration):
    draws = uniform(key, masked.shape[1])
    share = budget / jnp.maximum(jnp.sum(masked, axis=1), 1)
    return (masked & (draws < share[:, None])) | best(-draws, masked, budget > 0)


@dataclasses.dataclass(frozen=True)
class Threshold(Unmask):
  """All that reach the threshold, and always the most confident, whatever the budget.

  Fast-dLLM (arXiv 2505.22618) with slack=0, and dInfer's threshold decoder (arXiv 2510.08666).

  Attributes:
    threshold: of confidence. Fast-dLLM and dInfer's code 0.9, dInfer's paper 0.8.
    start: None, or where the threshold stands in the first iteration: in iteration n of the row it
      is max(start - decay * n, threshold). dInfer's iteration smoothing begins at 1.
    decay: per iteration.
    slack: what is within it of the most confident is written too. dInfer's code compares with
      min(max - 1e-5, threshold), so that rounding cannot leave a row without progress.
  """

  threshold: float = 0.9
  start: float | None = None
  decay: float = 0.02
  slack: float = 1e-5

  def __post_init__(self):
    check_thresholds(self, "threshold", "start", "decay", "slack")

  def __call__(self, confidence, masked, budget, key, iteration):
    sure = confidence >= falling(self.threshold, self.start, self.decay, iteration)
    if self.slack:
      open_to = jnp.where(masked, confidence, -jnp.inf)
      sure |= confidence >= jnp.max(open_to, axis=1, keepdims=True) - self.slack
    return (masked & sure) | most_confident(confidence, masked)


@dataclasses.dataclass(frozen=True)
class ThresholdOrBudget(Unmask):
  """All above the threshold; the `budget` most confident, at least one, where those are more.

  LLaDA2.0 (arXiv 2512.15745), whose fallback is the number that the steps ask for, and with as many
  steps as tokens LLaDA2.1 (arXiv 2602.08676), whose fallback is one.

  Attributes:
    threshold: of confidence, to be exceeded. 0.95 is LLaDA2.0's for quality, 0.85 for speed.
  """

  threshold: float = 0.95

  def __post_init__(self):
    check_thresholds(self, "threshold")

  def __call__(self, confidence, masked, budget, key, iteration):
    sure = masked & (confidence > self.threshold)
    return sure | best(confidence, masked, jnp.maximum(budget, 1))


@dataclasses.dataclass(frozen=True)
class Factor(Unmask):
  """The n most confident, as long as the n-th has at least 1 - factor / (n + 1), at least one.

  Fast-dLLM's factor rule (arXiv 2505.22618): if n tokens each have probability above 1 - e and
  (n + 1) e <= 1, then writing them at once is what greedy decoding would do one by one. Its code
  cannot tell a failure of the last masked position from none, and writes it then too; here it
  waits for its turn.

  Attributes:
    factor: 1 for the theorem; more writes more at once.
  """

  factor: float = 1.0

  def __post_init__(self):
    if not (math.isfinite(self.factor) and self.factor >= 0):
      raise ValueError(f"factor is a finite number of at least 0; got {self.factor}")

  def __call__(self, confidence, masked, budget, key, iteration):
    order, rank = ranking(confidence, masked)
    ordered = jnp.take_along_axis(confidence, order, axis=1)
    places = jnp.arange(1, masked.shape[1] + 1)
    passes = (ordered >= 1.0 - self.factor / (places + 1)) | (places == 1)
    count = jnp.sum(jnp.cumprod(passes, axis=1), axis=1)
    return masked & (rank < count[:, None])


@dataclasses.dataclass(frozen=True)
class Hierarchical(Unmask):
  """The most confident of each run of masks, so that what is written at once lies apart.

  dInfer's hierarchical decoder (arXiv 2510.08666): a run's best is written if it exceeds
  `low_threshold`, every position that exceeds `threshold` too, and always the most confident of
  all. A run that is cut in the middle each time is done in about log2 of its length iterations.
  Among equals of a run the lowest position is its best.

  Attributes:
    threshold, low_threshold: dInfer's guide has 0.8 and 0.5, its benchmarks 0.92 and 0.62, 0.9 and
      0.7, 0.85 and 0.75.
    start, decay: as of `Threshold`, for `threshold`.
  """

  threshold: float = 0.8
  low_threshold: float = 0.5
  start: float | None = None
  decay: float = 0.02

  def __post_init__(self):
    check_thresholds(self, "threshold", "low_threshold", "start", "decay")
    if self.low_threshold > self.threshold:
      raise ValueError(
        f"low_threshold {self.low_threshold} is above threshold {self.threshold}: what exceeds "
        "threshold is written anyway, so give a lower low_threshold"
      )

  def __call__(self, confidence, masked, budget, key, iteration):
    sure = confidence > falling(self.threshold, self.start, self.decay, iteration)
    lead = best_of_runs(confidence, masked) & (confidence > self.low_threshold)
    return (masked & (sure | lead)) | most_confident(confidence, masked)


def best(score: jax.Array, masked: jax.Array, count: jax.Array) -> jax.Array:
  """The `count` [B] highest scores among `masked`, ties to the lowest position. bool[B, W].

  A fraction of `count` is dropped.
  """
  rank = ranking(score, masked)[1]
  return masked & (rank < count.astype(jnp.int32)[:, None])


def most_confident(confidence: jax.Array, masked: jax.Array) -> jax.Array:
  """One position of every row that has any. bool[B, W]."""
  return best(confidence, masked, jnp.ones(masked.shape[0], jnp.int32))


def best_of_runs(confidence: jax.Array, masked: jax.Array) -> jax.Array:
  """The most confident of each run of neighbours in `masked`, ties to the lowest. bool[B, W]."""
  width = masked.shape[1]
  before = jnp.pad(masked[:, :-1], ((0, 0), (1, 0)))
  run = jnp.cumsum(masked & ~before, axis=1)  # from 1; its number holds on until the next begins
  rank = jnp.where(masked, ranking(confidence, masked)[1], width)
  lowest = jax.vmap(lambda r, i: jnp.full(width + 1, width).at[i].min(r))(rank, run)
  return masked & (rank == jnp.take_along_axis(lowest, run, axis=1))


def ranking(score: jax.Array, masked: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(order, rank) int32[B, W]: what is masked first, then by score, falling; not a number last."""
  # Two keys and not a score of -inf for what is not masked: a masked position may score -inf.
  order = jnp.lexsort((-score, ~masked), axis=-1)  # stable: equal keys keep their order
  return order, jnp.argsort(order, axis=-1)


def perturbed(confidence: jax.Array, temperature: float, keys: jax.Array) -> jax.Array:
  """A score whose `best` are draws without replacement by softmax(confidence / temperature).

  The k highest of logits plus standard Gumbel noise are such a draw (Gumbel top-k).
  """
  if temperature == 0.0:
    return confidence
  noise = by_column(lambda key: jax.random.gumbel(key), keys, confidence.shape[1])
  return confidence / temperature + noise


def uniform(keys: jax.Array, width: int) -> jax.Array:
  """float32[B, width] in [0, 1)."""
  return by_column(lambda key: jax.random.uniform(key), keys, width)


def by_column(draw, keys: jax.Array, width: int) -> jax.Array:
  """draw(key) for each column, [B, width]: what a column draws does not depend on the width."""

  def at(row_key, column):
    return draw(jax.random.fold_in(row_key, column))

  return jax.vmap(jax.vmap(at, in_axes=(None, 0)), in_axes=(0, None))(keys, jnp.arange(width))


def falling(threshold: float, start: float | None, decay: float, iteration: jax.Array):
  """max(start - decay * iteration, threshold) for each row, float32[B, 1]; without start a number."""
  if start is None:
    return threshold
  return jnp.maximum(start - decay * iteration.astype(jnp.float32), threshold)[:, None]


def check_thresholds(rule, *names: str) -> None:
  for name in names:
    value = getattr(rule, name)
    if value is not None and not 0.0 <= value <= 1.0:
      raise ValueError(f"{name} of {type(rule).__name__} lies between 0 and 1; got {value}")


def check_temperature(alg_temp: float) -> None:
  if not (math.isfinite(alg_temp) and alg_temp >= 0):
    raise ValueError(f"alg_temp is a finite number of at least 0; got {alg_temp}")
