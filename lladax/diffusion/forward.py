"""The forward process: when (time samplers) and where (mask_tokens) text turns into MASK.

Every draw is derived from (seed, step, global example index) and made in float32, so the noise is
the same on every mesh, host count and microbatch split, and after every restart.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from lladax.types import Batch, BoolPerToken, PerExample, Tokens

# The stream of times within a step; no example of a batch has this index.
TIMES_STREAM = 2**32 - 1


def step_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
  """The key of one step, from which all its noise is derived. Both may be traced."""
  return jax.random.fold_in(jax.random.key(seed), step)


def time_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
  """The key for a `TimeSampler` at this step."""
  return jax.random.fold_in(step_key(seed, step), TIMES_STREAM)


def noise_keys(seed: int | jax.Array, step: int | jax.Array, example_ids: jax.Array) -> jax.Array:
  """One key per example: fold_in(fold_in(key(seed), step), example).

  Args:
    seed, step: integers, may be traced.
    example_ids: int32[B], the index of each row within the global batch of the step.

  Returns:
    Keys [B]. The key of an example does not depend on which other rows are asked for.
  """
  base = step_key(seed, step)
  return jax.vmap(lambda example: jax.random.fold_in(base, example))(example_ids)


def open_uniform(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
  """Uniform float32 on the open interval (0, 1): u and 1 - u are both exact and never 0."""
  # jax draws multiples of 2**-23 in [0, 1); the half step keeps away from both ends.
  return jax.random.uniform(key, shape, jnp.float32) + 2.0**-24


class TimeSampler(abc.ABC):
  """Draws the times of a whole global batch. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def __call__(self, key: jax.Array, batch_size: int) -> PerExample:
    """Times float32[B] in (0, 1], a deterministic function of the key; each row uniform alone."""

  def cdf(self, t: float) -> float:
    """The probability that the time of a row is at most t."""
    return min(max(t, 0.0), 1.0)


@dataclasses.dataclass(frozen=True)
class Uniform(TimeSampler):
  """Independent uniform times. The time of row i does not depend on the batch size."""

  def __call__(self, key, batch_size):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch_size))
    return jax.vmap(open_uniform)(keys)


@dataclasses.dataclass(frozen=True)
class Stratified(TimeSampler):
  """One time in each of B equal strata: (u0 + i/B) mod 1 with a shared offset u0 (VDM).

  Rows are assigned to strata at random, so that a microbatch or a device, which holds neighbouring
  rows, sees all noise levels and not one band of them: router statistics depend on the level. Each
  row alone is exactly uniform; the batch mean of t deviates from 1/2 by at most 1/(2B).
  """

  def __call__(self, key, batch_size):
    offset_key, order_key = jax.random.split(key)
    strata = jax.random.permutation(order_key, batch_size).astype(jnp.float32) / batch_size
    # 1 - [0, 1) lies in (0, 1].
    return 1.0 - (open_uniform(offset_key) + strata) % 1.0


@dataclasses.dataclass(frozen=True)
class Antithetic(TimeSampler):
  """Pairs (t, 1 - t) in neighbouring rows. A row's time does not depend on the batch size."""

  def __call__(self, key, batch_size):
    rows = jnp.arange(batch_size)
    keys = jax.vmap(lambda pair: jax.random.fold_in(key, pair))(rows // 2)
    first = jax.vmap(open_uniform)(keys)
    return jnp.where(rows % 2 == 0, first, 1.0 - first)


@dataclasses.dataclass(frozen=True)
class Band(TimeSampler):
  """Times of another sampler squeezed into (low, high]: for a band of noise levels.

  The 0.3 to 0.8 default is the fine-tuning band of LLaDA2.0's dFactory recipe. The loss is then a
  mean over the band and no bound on the likelihood.
  """

  low: float = 0.3
  high: float = 0.8
  inner: TimeSampler = Stratified()

  def __post_init__(self):
    if not 0.0 <= self.low < self.high <= 1.0:
      raise ValueError(f"a band has 0 <= low < high <= 1; got low={self.low}, high={self.high}")

  def __call__(self, key, batch_size):
    inner = self.inner(key, batch_size)
    return jnp.clip(self.low + (self.high - self.low) * inner, self.low, self.high)

  def cdf(self, t):
    return self.inner.cdf((t - self.low) / (self.high - self.low))


@struct.dataclass
class Noised:
  """A noised batch; every leaf has the leading axis B, so it splits into microbatches.

  Attributes:
    tokens: int32[B, L]. The text with MASK where `is_masked`.
    is_masked: bool[B, L].
    t: float32[B], the time of each row.
    mask_rate: float32[B], the probability with which each maskable token of the row was masked.
  """

  tokens: Tokens
  is_masked: BoolPerToken
  t: PerExample
  mask_rate: PerExample


def mask_tokens(batch: Batch, t: PerExample, keys: jax.Array, *, schedule, mask_id: int) -> Noised:
  """Masks each maskable token independently with probability 1 - alpha(t), nothing else.

  Args:
    batch: clean text [B, L].
    t: float32[B].
    keys: [B], one per row (`noise_keys`); a row draws from its own key only.
    schedule: a `Schedule`.
    mask_id: the id written where the text is masked.
  """
  length = batch.tokens.shape[1]
  rate = schedule.mask_rate(t.astype(jnp.float32))
  # float32: in bfloat16 the draws, and with them the mask rate, are coarse where t is small.
  draws = jax.vmap(lambda key: jax.random.uniform(key, (length,), jnp.float32))(keys)  # [B, L]
  is_masked = (draws < rate[:, None]) & batch.maskable
  tokens = jnp.where(is_masked, mask_id, batch.tokens)
  return Noised(tokens=tokens, is_masked=is_masked, t=t, mask_rate=rate)
