"""Which experts a token goes to, and how evenly the experts are used.

A router is a frozen dataclass with one pure method, logits -> `Routing`. Statistics are returned,
never hidden in a collection: the objective adds the losses, the logger draws the load.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class RouterStats:
  """Means over the real tokens of one layer; stacked to [n, ...] over layers.

  Attributes:
    load: float32[E], fraction of the T * k slots that each expert received. Adds up to 1.
    probability: float32[E], mean router probability. Adds up to 1.
    entropy: float32[], mean entropy of a token's router distribution, in nats.
    balance_loss: float32[], E * sum_e load_e * probability_e: 1 when balanced, at most E. This is
      the normalised form; the form that sums over the k slots is k times as large (facts of
      LLaDA-MoE, arXiv 2509.24389, leave the choice open).
    z_loss: float32[], mean of logsumexp(logits)^2.
    dropped: float32[], slots that no expert computed. 0 for dropless dispatch.
  """

  load: jax.Array
  probability: jax.Array
  entropy: jax.Array
  balance_loss: jax.Array
  z_loss: jax.Array
  dropped: jax.Array


@struct.dataclass
class Routing:
  """The router's decision for T tokens.

  Attributes:
    weights: float32[T, k], what each chosen expert's output is multiplied by.
    experts: int32[T, k], distinct within a token.
    probabilities: float32[T, E], the full distribution, for statistics.
  """

  weights: jax.Array
  experts: jax.Array
  probabilities: jax.Array


class Router(abc.ABC):
  """logits -> `Routing`. A new router is one subclass; the contract tests find it."""

  @abc.abstractmethod
  def __call__(self, logits: jax.Array, num_experts_per_tok: int) -> Routing:
    """float32[T, E] -> Routing with [T, k]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKSoftmax(Router):
  """Softmax over all experts in float32, then the k largest.

  LLaDA-MoE (arXiv 2509.24389) does not renormalise the chosen weights: their sum stays below 1.

  Attributes:
    norm_topk_prob: divide the chosen weights by their sum (LLaDA-MoE v2, Qwen2-MoE).
    routed_scaling_factor: multiplies the weights.
  """

  norm_topk_prob: bool = False
  routed_scaling_factor: float = 1.0

  def __call__(self, logits: jax.Array, num_experts_per_tok: int) -> Routing:
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, num_experts_per_tok)
    if self.norm_topk_prob:
      weights = weights / weights.sum(-1, keepdims=True)
    weights = weights * self.routed_scaling_factor
    return Routing(weights=weights, experts=experts, probabilities=probabilities)


def router_stats(logits: jax.Array, routing: Routing, valid: jax.Array | None = None):
  """`RouterStats` of T tokens, padding left out.

  The load is a count and carries no gradient: the balance loss acts through the probabilities
  (Switch Transformer, arXiv 2101.03961, eq. 4; LLaDA-MoE adds it with weight 0.01 and the z-loss
  with 0.001).

  Args:
    logits: float32[T, E].
    routing: the router's decision.
    valid: bool[T], False on padding; None: all are real.
  """
  num_experts = logits.shape[-1]
  weight = jnp.ones(logits.shape[0]) if valid is None else valid.astype(jnp.float32)
  weight = weight / jnp.maximum(weight.sum(), 1.0)

  chosen = routing.experts[..., None] == jnp.arange(num_experts)  # [T, k, E]
  chosen = chosen.sum(1, dtype=jnp.float32) / routing.experts.shape[1]
  load = jax.lax.stop_gradient(weight @ chosen)
  p = routing.probabilities
  p = p / p.sum(-1, keepdims=True)
  probability = weight @ p
  entropy = -weight @ jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)
  z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return RouterStats(
    load=load,
    probability=probability,
    entropy=entropy,
    balance_loss=num_experts * (load * probability).sum(),
    z_loss=weight @ jnp.square(z),
    dropped=jnp.zeros(()),
  )
