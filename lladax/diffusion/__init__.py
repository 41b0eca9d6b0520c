"""Masked diffusion without a network: noise, objective and likelihood bound."""

from lladax.diffusion.balance import BalanceLoad, BatchLoad, PreviousLoad
from lladax.diffusion.forward import (
  Antithetic,
  Band,
  Noised,
  Stratified,
  TimeSampler,
  Uniform,
  mask_tokens,
  noise_keys,
)
from lladax.diffusion.likelihood import log_likelihood_bound, repeat_rows
from lladax.diffusion.objective import (
  BatchLength,
  Elbo,
  Normalization,
  Objective,
  ResponseLength,
  SupervisedToken,
  Unweighted,
  Weighting,
  masked_nll,
  nll_from_logits,
  time_buckets,
)
from lladax.diffusion.schedule import Cosine, Linear, Polynomial, Schedule

__all__ = [
  "Antithetic",
  "BalanceLoad",
  "Band",
  "BatchLength",
  "BatchLoad",
  "Cosine",
  "Elbo",
  "Linear",
  "Noised",
  "Normalization",
  "Objective",
  "Polynomial",
  "PreviousLoad",
  "ResponseLength",
  "Schedule",
  "Stratified",
  "SupervisedToken",
  "TimeSampler",
  "Uniform",
  "Unweighted",
  "Weighting",
  "log_likelihood_bound",
  "mask_tokens",
  "masked_nll",
  "nll_from_logits",
  "noise_keys",
  "repeat_rows",
  "time_buckets",
]
