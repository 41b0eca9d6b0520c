"""Which experts a token goes to, and how evenly the experts are used.

A router is a frozen dataclass with one pure method, logits -> `Routing`. Statistics are returned,
never hidden in a collection: the objective adds the losses, the logger draws the load.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection

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
    dropped: float32[], slots that no expert computed, a number and not a mean. 0 unless the
      exchange was asked to drop what its buffer does not hold.
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
    probabilities: float32[T, E], every expert's score, for statistics (which normalise it).
  """

  weights: jax.Array
  experts: jax.Array
  probabilities: jax.Array


class Router(abc.ABC):
  """logits -> `Routing`. A new router is one subclass; the contract tests find it."""

  @property
  def has_bias(self) -> bool:
    """Whether the layer keeps a bias [E] that takes part in the choice of experts."""
    return False

  @abc.abstractmethod
  def __call__(
    self, logits: jax.Array, num_experts_per_tok: int, bias: jax.Array | None = None
  ) -> Routing:
    """float32[T, E] and, where `has_bias`, float32[E] -> Routing with [T, k].

    The bias moves the choice only, never the weights, and gets no gradient.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKSoftmax(Router):
  """Softmax over all experts in float32, then the k largest.

  LLaDA-MoE (arXiv 2509.24389) does not renormalise the chosen weights: their sum stays below 1.

  Attributes:
    norm_topk_prob: divide the chosen weights by their sum (LLaDA-MoE v2, Qwen2-MoE).
    routed_scaling_factor: multiplies the weights.
    expert_bias: a bias is added to the probabilities for the choice of experts.
  """

  norm_topk_prob: bool = False
  routed_scaling_factor: float = 1.0
  expert_bias: bool = False

  @property
  def has_bias(self) -> bool:
    return self.expert_bias

  def __call__(self, logits, num_experts_per_tok, bias=None) -> Routing:
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = _top_k(probabilities, _biased(probabilities, bias), num_experts_per_tok)
    if self.norm_topk_prob:
      weights = weights / weights.sum(-1, keepdims=True)
    weights = weights * self.routed_scaling_factor
    return Routing(weights=weights, experts=experts, probabilities=probabilities)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidBias(Router):
  """The router of Ling 2.0 and LLaDA2.0 (arXiv 2512.15745): a sigmoid per expert, in groups.

  Experts lie in `n_group` equal groups. A group's score is the sum of its two best biased scores;
  experts outside the `topk_group` best groups are out. Of the others the k best by biased score
  are chosen and weighted by their own scores.

  Attributes:
    n_group: number of groups; it divides E.
    topk_group: groups that stay.
    norm_topk_prob: divide the chosen weights by their sum.
    routed_scaling_factor: multiplies the weights (2.5 in LLaDA2.0).

  Raises:
    ValueError: if topk_group is not between 1 and n_group; on call, if n_group does not divide E
      or the groups that stay hold fewer than k experts.
  """

  n_group: int = 1
  topk_group: int = 1
  norm_topk_prob: bool = True
  routed_scaling_factor: float = 1.0

  def __post_init__(self):
    if not 1 <= self.topk_group <= self.n_group:
      raise ValueError(
        f"topk_group lies between 1 and n_group={self.n_group}; got {self.topk_group}"
      )

  @property
  def has_bias(self) -> bool:
    return True

  def __call__(self, logits, num_experts_per_tok, bias=None) -> Routing:
    E = logits.shape[-1]
    if E % self.n_group or E // self.n_group * self.topk_group < num_experts_per_tok:
      raise ValueError(
        f"{self!r} cannot choose {num_experts_per_tok} of {E} experts: n_group must divide them and "
        "the groups that stay must hold as many"
      )
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    choice = self._within_groups(_biased(scores, bias))
    weights, experts = _top_k(scores, choice, num_experts_per_tok)
    if self.norm_topk_prob:
      weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    weights = weights * self.routed_scaling_factor
    return Routing(weights=weights, experts=experts, probabilities=scores)

  def _within_groups(self, choice: jax.Array) -> jax.Array:
    """[T, E] with -inf in all but the best groups."""
    if self.topk_group == self.n_group:
      return choice
    grouped = choice.reshape(choice.shape[0], self.n_group, -1)  # [T, groups, E / groups]
    best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
    stay = jax.lax.top_k(best_two, self.topk_group)[1]
    stays = (stay[:, :, None] == jnp.arange(self.n_group)).any(1)  # [T, groups]
    return jnp.where(stays[..., None], grouped, -jnp.inf).reshape(choice.shape)


def _biased(scores: jax.Array, bias: jax.Array | None) -> jax.Array:
  return scores if bias is None else scores + jax.lax.stop_gradient(bias.astype(jnp.float32))


def _top_k(scores: jax.Array, choice: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The experts of the k largest in `choice`, and their `scores`."""
  if choice is scores:
    return jax.lax.top_k(scores, k)
  experts = jax.lax.top_k(choice, k)[1]
  return jnp.take_along_axis(scores, experts, axis=-1), experts


def router_stats(
  logits: jax.Array,
  routing: Routing,
  valid: jax.Array | None = None,
  *,
  dropped: jax.Array | None = None,
  axes: Collection[str] = (),
) -> RouterStats:
  """`RouterStats` of T tokens, padding left out.

  The load is a count and carries no gradient: the balance loss acts through the probabilities
  (Switch Transformer, arXiv 2101.03961, eq. 4; LLaDA-MoE adds it with weight 0.01 and the z-loss
  with 0.001).

  Args:
    logits: float32[T, E].
    routing: the router's decision.
    valid: bool[T], False on padding; None: all are real.
    dropped: slots that found no room on this device; None: there are none.
    axes: axes of the mesh over which the devices have other tokens: the statistics are of all of
      them.
  """
  num_experts = logits.shape[-1]
  weight = jnp.ones(logits.shape[0]) if valid is None else valid.astype(jnp.float32)
  chosen = routing.experts[..., None] == jnp.arange(num_experts)  # [T, k, E]
  chosen = chosen.sum(1, dtype=jnp.float32) / routing.experts.shape[1]
  p = routing.probabilities
  p = p / p.sum(-1, keepdims=True)
  entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)
  z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)

  sums = {
    "tokens": weight.sum(),
    "load": jax.lax.stop_gradient(weight @ chosen),
    "probability": weight @ p,
    "entropy": weight @ entropy,
    "z": weight @ jnp.square(z),
  }
  if axes:
    sums = jax.lax.psum(sums, tuple(sorted(axes)))
  tokens = jnp.maximum(sums["tokens"], 1.0)
  load, probability = sums["load"] / tokens, sums["probability"] / tokens
  return RouterStats(
    load=load,
    probability=probability,
    entropy=sums["entropy"] / tokens,
    balance_loss=num_experts * (load * probability).sum(),
    z_loss=sums["z"] / tokens,
    dropped=jnp.asarray(0 if dropped is None else dropped, jnp.float32),
  )
