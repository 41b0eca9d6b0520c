"""Noise schedules: alpha(t), the probability that a token is still visible at time t.

Time runs from 0 (clean) to 1 (all masked). A schedule states alpha(t); the mask rate 1 - alpha(t)
and the weight of the evidence bound, -alpha'(t) / (1 - alpha(t)), follow from it by
differentiation, so a new schedule cannot contradict itself (MDLM, arXiv 2406.07524; MD4,
arXiv 2406.04329).
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp


class Schedule(abc.ABC):
  """Gives alpha(t); everything else is derived. Subclasses are frozen dataclasses.

  alpha falls from about 1 at t = 0 to about 0 at t = 1. `eps` of the schedules below is the mask
  rate at t = 0: it bounds the weight by about alpha'(0) / eps where a weight of 1/t would explode.
  """

  @abc.abstractmethod
  def alpha(self, t: jax.Array) -> jax.Array:
    """Probability that a token survives to time t. Elementwise, differentiable, float32."""

  def mask_rate(self, t: jax.Array) -> jax.Array:
    """1 - alpha(t): the probability that a token is masked at time t."""
    return 1.0 - self.alpha(t)

  def weight(self, t: jax.Array) -> jax.Array:
    """-alpha'(t) / (1 - alpha(t)), the weight of a masked token in the evidence bound. Positive."""
    t = jnp.asarray(t, jnp.float32)
    rate, slope = jax.jvp(self.mask_rate, (t,), (jnp.ones_like(t),))
    return slope / rate


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
  """alpha(t) = (1 - eps)(1 - t), hence LLaDA's mask rate (1 - eps) t + eps (arXiv 2502.09992)."""

  eps: float = 1e-3

  def __post_init__(self):
    check_eps(self.eps)

  def alpha(self, t):
    return (1.0 - self.eps) * (1.0 - t)

  def mask_rate(self, t):
    # Said a second time because 1 - alpha loses four of float32's seven digits near t = 0, and the
    # weight there is the reciprocal.
    return (1.0 - self.eps) * t + self.eps


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """alpha(t) = (1 - eps)(1 - cos(pi/2 (1 - t))): masks quickly at first (MaskGIT, MD4)."""

  eps: float = 1e-3

  def __post_init__(self):
    check_eps(self.eps)

  def alpha(self, t):
    return (1.0 - self.eps) * (1.0 - jnp.cos(0.5 * jnp.pi * (1.0 - t)))


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
  """alpha(t) = (1 - eps)(1 - t**power); power 1 is `Linear` (MD4, arXiv 2406.04329)."""

  power: float = 2.0
  eps: float = 1e-3

  def __post_init__(self):
    check_eps(self.eps)
    if not self.power >= 1.0:
      raise ValueError(
        f"power is at least 1, so that the weight is finite at t = 0; got {self.power}"
      )

  def alpha(self, t):
    return (1.0 - self.eps) * (1.0 - t**self.power)


def check_eps(eps: float) -> None:
  if not 0.0 < eps < 1.0:
    raise ValueError(f"eps, the mask rate at t = 0, lies strictly between 0 and 1; got {eps}")
