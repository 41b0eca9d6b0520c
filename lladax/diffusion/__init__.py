"""Masked diffusion without a network: noise, objective and likelihood bound."""

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
  router_loss,
)
from lladax.diffusion.schedule import Cosine, Linear, Polynomial, Schedule

__all__ = [
  "Antithetic",
  "Band",
  "BatchLength",
  "Cosine",
  "Elbo",
  "Linear",
  "Noised",
  "Normalization",
  "Objective",
  "Polynomial",
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
  "router_loss",
]
