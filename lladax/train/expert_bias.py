"""The expert biases of a router follow the load, not a gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

BIAS = "expert_bias"  # the name of the parameter, [n, E]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasUpdate:
  """b += rate * (sign(e) - mean sign(e)), with e_i the load that expert i lacks for its equal share.

  Balance without a balance loss (arXiv 2408.15664), in the form of Ling 2.0 (arXiv 2510.22115),
  whose biases keep their mean. Ling took 1e-3, and 1e-4 after the context was extended. The load is
  that of the whole batch of the step.

  Attributes:
    rate: of one step, whatever the learning rate.
  """

  rate: float = 1e-3

  def __post_init__(self):
    if not 0 <= self.rate < float("inf"):
      raise ValueError(f"rate is finite and at least 0; got {self.rate}")

  def __call__(self, bias: jax.Array, load_share: jax.Array) -> jax.Array:
    """The change of the biases; both float32[..., E]."""
    lacks = jnp.sign(load_share.mean(-1, keepdims=True) - load_share)
    return self.rate * (lacks - lacks.mean(-1, keepdims=True)).astype(bias.dtype)

  def transformation(self) -> optax.GradientTransformationExtraArgs:
    """Of the biases alone; its update needs `load_share` float32[n, E]."""

    def update(updates, state, params=None, *, load_share=None, **others):
      del params, others
      if jax.tree.leaves(updates) and load_share is None:
        raise ValueError("the biases follow the routers' load, and the loss reports none")
      return jax.tree.map(lambda bias: self(bias, load_share), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
