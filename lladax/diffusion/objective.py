"""The training objective: weighted cross-entropy of masked tokens, normalised by name.

The weights are known once the noise is drawn and are divided by their normalisation over the
global batch before the network runs. The loss of the batch is then sum(weights * nll): sums over
microbatches, hosts and devices just add. So do the router's losses, which are divided by the tokens
of the global batch.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from lladax.diffusion.balance import BalanceLoad, BatchLoad
from lladax.diffusion.forward import (
  Noised,
  Stratified,
  TimeSampler,
  mask_tokens,
  noise_keys,
  time_key,
)
from lladax.diffusion.schedule import Linear, Schedule
from lladax.types import (
  Batch,
  Denoise,
  PerExample,
  PerToken,
  RowGroups,
  Scalar,
  Sums,
  TokenNll,
)

# Metrics by noise level: equal buckets of t, [0, 1/8), [1/8, 2/8), ...
T_BUCKETS = 8


class Weighting(abc.ABC):
  """How much a masked token counts at time t. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def __call__(self, schedule: Schedule, t: PerExample) -> PerExample:
    """Weights float32[B], positive."""


@dataclasses.dataclass(frozen=True)
class Elbo(Weighting):
  """The evidence bound: -alpha'(t) / (1 - alpha(t)), divided by alpha(0) - alpha(1).

  The bound is the mean over mask rates p of E[sum of masked nll] / p. Times in (0, 1] reach the
  rates from 1 - alpha(0) = eps upwards only, and the division makes what they give a mean again.
  For `Linear` the result is 1 / p_mask with p_mask = (1 - eps) t + eps, to the last digit LLaDA's
  reference weight (arXiv 2502.09992, Algorithm 1, and its published guidelines).
  """

  def __call__(self, schedule, t):
    reach = schedule.alpha(jnp.zeros((), jnp.float32)) - schedule.alpha(jnp.ones((), jnp.float32))
    return schedule.weight(t) / reach


@dataclasses.dataclass(frozen=True)
class Unweighted(Weighting):
  """Every masked token counts 1 (MaskGIT; dFactory's fine-tuning). Not a bound."""

  def __call__(self, schedule, t):
    return jnp.ones_like(t)


class Normalization(abc.ABC):
  """What the sum of weighted losses is divided by. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def __call__(self, batch: Batch, noised: Noised) -> jax.Array:
    """Divisors, broadcastable to [B, L], at least 1, computed over the global batch."""


@dataclasses.dataclass(frozen=True)
class BatchLength(Normalization):
  """Pre-training: batch x length, that is the maskable tokens of the batch, masked or not."""

  def __call__(self, batch, noised):
    return jnp.maximum(jnp.sum(batch.maskable, dtype=jnp.float32), 1.0)


@dataclasses.dataclass(frozen=True)
class ResponseLength(Normalization):
  """Fine-tuning: each response by its length (its maskable tokens), then the mean over responses.

  A segment has one response: a row has as many as documents are packed into it. Segments without a
  response do not count. EOS that pads a response counts as response where the data pipeline says so
  in `maskable` (LLaDA does).
  """

  def __call__(self, batch, noised):
    segments = batch.segment_ids
    most = segments.shape[1] + 1

    def lengths_of(segments, maskable):
      return jnp.zeros(most, jnp.float32).at[segments].add(maskable.astype(jnp.float32))

    lengths = jax.vmap(lengths_of)(segments, batch.maskable)  # [B, segments]
    responses = jnp.maximum(jnp.sum(lengths > 0, dtype=jnp.float32), 1.0)
    return jnp.maximum(jnp.take_along_axis(lengths, segments, axis=1), 1.0) * responses


@dataclasses.dataclass(frozen=True)
class SupervisedToken(Normalization):
  """The number of tokens that were masked: with `Unweighted`, plain mean cross-entropy."""

  def __call__(self, batch, noised):
    return jnp.maximum(jnp.sum(noised.is_masked, dtype=jnp.float32), 1.0)


@struct.dataclass
class WeightedNoised(Noised):
  """`Noised` and the weight of every token in the loss of the global batch.

  Attributes:
    weights: float32[B, L], 0 where not masked, already divided by the normalisation.
    batch_tokens: float32[B], on every row the real tokens (no padding) of the global batch: what
      the router's losses are divided by.
  """

  weights: PerToken
  batch_tokens: PerExample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """What is trained. The defaults are LLaDA's pre-training loss with LLaDA-MoE's router losses.

  Fine-tuning on responses is `normalize=ResponseLength()`. The router coefficients are those of
  arXiv 2509.24389, applied to the normalised balance loss (1 when balanced); trainers that sum
  over the k slots of a token press k times harder with the same coefficient.

  Attributes:
    schedule: of the noise.
    times: how the times of a batch are drawn.
    weight: of a masked token.
    normalize: what the weighted losses are divided by.
    balance_loss: coefficient of the balance loss.
    z_loss: coefficient of the router's z-loss.
    balance_load: with which load the balance loss is taken, where a batch has several parts.
  """

  schedule: Schedule = Linear()
  times: TimeSampler = Stratified()
  weight: Weighting = Elbo()
  normalize: Normalization = BatchLength()
  balance_loss: float = 0.01
  z_loss: float = 0.001
  balance_load: BalanceLoad = BatchLoad()

  def __post_init__(self):
    for name in ("balance_loss", "z_loss"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name} is a coefficient of at least 0; got {getattr(self, name)}")

  def noise(
    self, batch: Batch, seed: int | jax.Array, step: int | jax.Array, *, mask_id: int
  ) -> WeightedNoised:
    """Noises the whole global batch of a step; split into microbatches afterwards.

    Args:
      batch: the global batch [B, L]. Its rows may be sharded over devices.
      seed, step: integers, may be traced. With the row index they determine the noise.
      mask_id: the id of MASK.
    """
    rows = batch.tokens.shape[0]
    t = self.times(time_key(seed, step), rows)
    keys = noise_keys(seed, step, jnp.arange(rows, dtype=jnp.uint32))
    noised = mask_tokens(batch, t, keys, schedule=self.schedule, mask_id=mask_id)
    scale = self.weight(self.schedule, t)[:, None] / self.normalize(batch, noised)
    real = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
    return WeightedNoised(
      tokens=noised.tokens,
      is_masked=noised.is_masked,
      t=noised.t,
      mask_rate=noised.mask_rate,
      weights=jnp.where(noised.is_masked, scale, 0.0),
      batch_tokens=jnp.broadcast_to(real, (rows,)),
    )


def masked_nll(
  token_nll: TokenNll,
  batch: Batch,
  noised: WeightedNoised,
  *,
  objective: Objective,
  share: float = 1.0,
  load_share: jax.Array | None = None,
) -> tuple[Scalar, Sums, object]:
  """The loss of a (micro)batch, its metrics, and what else the network returned.

  Losses and `Sums` of the microbatches of a batch add up to those of the batch.

  Args:
    token_nll: the network, see `lladax.types.TokenNll`. Its aux is None, or has `balance_loss` and
      `z_loss` as `lladax.moe.RouterStats` has.
    batch: clean text [B, L].
    noised: `Objective.noise` of the global batch, the rows of this microbatch.
    objective: for the schedule and the router coefficients.
    share: the fraction of the global batch that this is, 1 / number of microbatches.
    load_share: float32[n, E], of the global batch, for the balance loss; None: of these rows, which
      must then be the whole batch.

  Returns:
    (loss float32[], `Sums` as of `loss_sums`, the network's aux). Differentiate the loss only.
  """
  total, nll, aux = token_nll(noised.tokens, batch.tokens, noised.weights)
  once = {"diffusion_loss": total}
  loss = total
  if aux is not None:
    tokens = noised.batch_tokens[0]
    once["balance_loss"] = jnp.mean(aux.balance_loss(load_share, tokens))
    once["z_loss"] = jnp.mean(aux.z_loss(tokens))
    loss = total + objective.balance_loss * once["balance_loss"] + objective.z_loss * once["z_loss"]
  once = jax.lax.stop_gradient({"loss": loss, **once})
  sums = loss_sums(jax.lax.stop_gradient(nll), batch, noised, schedule=objective.schedule)
  shares = dict.fromkeys(once, jnp.float32(share))
  return loss, Sums(sums=sums.sums | once, counts=sums.counts | shares), aux


def time_buckets(t: PerExample) -> RowGroups:
  """Rows by noise level: `T_BUCKETS` equal buckets of t."""
  return RowGroups(jnp.clip((t * T_BUCKETS).astype(jnp.int32), 0, T_BUCKETS - 1), T_BUCKETS)


def loss_sums(nll: PerToken, batch: Batch, noised: Noised, *, schedule: Schedule) -> Sums:
  """Metrics of a noised batch as sums and counts.

  Means, in nats unless said: `nll` the bound per maskable token (whatever weighting is trained;
  a bound only when the times cover (0, 1]), `bits` the same in bits; `masked_nll` the plain mean
  over masked tokens; `mask_rate` realised and `mask_rate_expected`. By the time of the row,
  float32[T_BUCKETS]: `masked_nll_by_t`, `mask_rate_by_t`, `mask_rate_expected_by_t` and the
  variance of a token's mask, `mask_variance_by_t`, both as the schedule has them at t, and
  `rows_by_t`, the share of the rows.
  """
  masked = noised.is_masked.astype(jnp.float32)
  row_nll = jnp.sum(jnp.where(noised.is_masked, nll, 0.0), axis=1)  # [B]
  row_masked = jnp.sum(masked, axis=1)
  row_maskable = jnp.sum(batch.maskable, axis=1, dtype=jnp.float32)
  bucket = time_buckets(noised.t).index
  # Not `noised.mask_rate`: who watches the noise does not ask whoever made it.
  rate = schedule.mask_rate(noised.t.astype(jnp.float32))

  def by_t(rows):
    return jnp.zeros(T_BUCKETS, jnp.float32).at[bucket].add(rows)

  bound = jnp.sum(Elbo()(schedule, noised.t) * row_nll)
  maskable = jnp.sum(row_maskable)
  pairs = {
    "nll": (bound, maskable),
    "bits": (bound / math.log(2), maskable),
    "masked_nll": (jnp.sum(row_nll), jnp.sum(row_masked)),
    "mask_rate": (jnp.sum(row_masked), maskable),
    "mask_rate_expected": (jnp.sum(noised.mask_rate * row_maskable), maskable),
    "masked_nll_by_t": (by_t(row_nll), by_t(row_masked)),
    "mask_rate_by_t": (by_t(row_masked), by_t(row_maskable)),
    "mask_rate_expected_by_t": (by_t(rate * row_maskable), by_t(row_maskable)),
    "mask_variance_by_t": (by_t(rate * (1 - rate) * row_maskable), by_t(row_maskable)),
    "rows_by_t": (by_t(jnp.ones_like(rate)), jnp.float32(rate.size)),
  }
  return Sums(
    sums={name: pair[0] for name, pair in pairs.items()},
    counts={name: pair[1] for name, pair in pairs.items()},
  )


def nll_from_logits(denoise: Denoise) -> TokenNll:
  """A `TokenNll` of a plain `Denoise`, by a log-softmax over all of [B, L, V]. aux is None."""

  def token_nll(tokens, targets, weights):
    logits = denoise(tokens).astype(jnp.float32)  # [B, L, V]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    # where and not a product: 0 * inf would spoil the sum with a NaN.
    nll = jnp.where(weights != 0, nll, 0.0)
    return jnp.sum(weights * nll), nll, None

  return token_nll
