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
from jax.ad_checkpoint import checkpoint_name

from lladax.types import RowGroups


@struct.dataclass
class RouterStats:
  """Sums over the real tokens of one layer, by group of rows; stacked to [n, ...] over layers.

  Sums and not means: those of the parts of a batch (devices, microbatches, hosts) add up to those
  of the batch, and are divided once, by the tokens of the batch. G groups, of which a row of the
  batch is in one (`lladax.types.RowGroups`).

  Attributes:
    tokens: float32[G], real tokens.
    load: float32[G, E], the slots that each expert received, divided by k: adds up to `tokens`.
      A count, without gradient.
    probability: float32[G, E], router probabilities, normalised: adds up to `tokens`.
    entropy: float32[G], entropies of the tokens' router distributions, in nats.
    z: float32[G], logsumexp(logits)^2.
    dropped: float32[], slots that no expert computed. 0 unless the exchange was asked to drop what
      its buffer does not hold.
  """

  tokens: jax.Array
  load: jax.Array
  probability: jax.Array
  entropy: jax.Array
  z: jax.Array
  dropped: jax.Array

  def load_share(self) -> jax.Array:
    """float32[..., E]: the part of all slots that each expert received. Adds up to 1, or 0."""
    return self.load.sum(-2) / jnp.maximum(self.tokens.sum(-1), 1.0)[..., None]

  def balance_loss(
    self, load_share: jax.Array | None = None, tokens: jax.Array | float | None = None
  ) -> jax.Array:
    """float32[...]: E * sum_e load_e * probability_e, 1 when balanced, at most E.

    The load is a count and carries no gradient: the loss acts through the probabilities (Switch
    Transformer, arXiv 2101.03961, eq. 4). This is the normalised form; the form that sums over the
    k slots is k times as large (arXiv 2509.24389 leaves the choice open).

    Args:
      load_share: float32[..., E], of the whole batch, where these are sums of a part of it. Their
        own if None.
      tokens: real tokens of the whole batch; the losses of its parts then add up to its loss.
    """
    load_share = self.load_share() if load_share is None else load_share
    mean = self.probability.sum(-2) / self._tokens(tokens)[..., None]
    return self.probability.shape[-1] * (jax.lax.stop_gradient(load_share) * mean).sum(-1)

  def z_loss(self, tokens: jax.Array | float | None = None) -> jax.Array:
    """float32[...]: the mean of logsumexp(logits)^2; `tokens` as for `balance_loss`."""
    return self.z.sum(-1) / self._tokens(tokens)

  def _tokens(self, tokens):
    return jnp.maximum(self.tokens.sum(-1) if tokens is None else jnp.asarray(tokens), 1.0)


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
  experts = jax.lax.top_k(jax.lax.stop_gradient(choice), k)[1]
  # By this name a policy of `jax.checkpoint` can keep them, and not choose again.
  experts = checkpoint_name(experts, "routing")
  return jnp.take_along_axis(scores, experts, axis=-1), experts


def router_stats(
  logits: jax.Array,
  routing: Routing,
  valid: jax.Array | None = None,
  *,
  groups: RowGroups | None = None,
  dropped: jax.Array | None = None,
  axes: Collection[str] = (),
) -> RouterStats:
  """`RouterStats` of T tokens, padding left out.

  Args:
    logits: float32[T, E].
    routing: the router's decision.
    valid: bool[T], False on padding; None: all are real.
    groups: of the tokens, in the order of the logits; None: one group.
    dropped: slots that found no room on this device; None: there are none.
    axes: axes of the mesh over which the devices have other tokens: the sums are over all of them.
  """
  num_tokens, num_experts = logits.shape
  member = jnp.ones((num_tokens, 1), jnp.float32)
  if groups is not None:
    member = groups.one_hot()  # [T, G]
  if valid is not None:
    member = jnp.where(valid[:, None], member, 0.0)
  chosen = routing.experts[..., None] == jnp.arange(num_experts)  # [T, k, E]
  chosen = chosen.sum(1, dtype=jnp.float32) / routing.experts.shape[1]
  p = routing.probabilities
  p = p / p.sum(-1, keepdims=True)
  entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)
  z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)

  def sum_by_group(x):
    # In full precision: an accelerator would round both factors.
    return jnp.einsum("tg,t...->g...", member, x, precision=jax.lax.Precision.HIGHEST)

  sums = {
    "tokens": member.sum(0),
    "load": jax.lax.stop_gradient(sum_by_group(chosen)),
    "probability": sum_by_group(p),
    "entropy": sum_by_group(entropy),
    "z": sum_by_group(jnp.square(z)),
  }
  if axes:
    sums = jax.lax.psum(sums, tuple(sorted(axes)))
  return RouterStats(**sums, dropped=jnp.asarray(0 if dropped is None else dropped, jnp.float32))
