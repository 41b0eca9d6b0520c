"""Useful floating-point operations of a model: what the mathematics asks for, no more.

Matrix products only, two operations per multiply-and-add. Attention is counted in full for
bidirectional models and by half for causal ones; of the experts those that a token goes to; the
head for those positions that are supervised. What a program recomputes is not useful.
"""

from __future__ import annotations

import dataclasses

from lladax.models import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlops:
  """Forward operations per token.

  Attributes:
    projections: query, key, value and output of attention, all layers.
    scores: queries with keys, and weights with values, all layers.
    router: all layers.
    experts: the k chosen and the shared one, all routed layers.
    dense: feed-forward layers that are not routed.
    head: of a supervised position, times the share of positions that are.
  """

  projections: float
  scores: float
  router: float
  experts: float
  dense: float
  head: float

  @property
  def total(self) -> float:
    return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def token_flops(
  model: ModelConfig, length: int, *, supervised: float = 1.0, keys: float | None = None
) -> TokenFlops:
  """Of a token in a row of `length`.

  Args:
    supervised: the share of positions whose logits are computed. Masked diffusion needs those of
      the masked ones, on average half; the usual convention, and decoding, is all of them: 1.
    keys: positions that a query looks at; None: all of the row, on average half if causal.
  """
  D, N, K, H = model.hidden_size, model.num_attention_heads, model.kv_heads, model.head_size
  layers = model.num_hidden_layers
  if keys is None:
    keys = (length + 1) / 2 if model.causal else length
  router = experts = 0.0
  if model.moe is not None:
    moe = model.moe
    router = 2 * D * moe.num_experts
    widths = moe.num_experts_per_tok * moe.expert_intermediate_size
    experts = 6 * D * (widths + (moe.shared_expert_intermediate_size or 0))
  return TokenFlops(
    projections=layers * 2 * D * H * (2 * N + 2 * K),
    scores=layers * 4 * N * H * keys,
    router=model.num_routed_layers * router,
    experts=model.num_routed_layers * experts,
    dense=model.num_dense_layers * 6 * D * (model.intermediate_size or 0),
    head=2 * D * model.vocab_size * supervised,
  )


def pass_flops(model: ModelConfig, length: int, *, keys: int, wanted: int) -> float:
  """Of a row in a pass of decoding over `length` columns that look at `keys`.

  Args:
    wanted: columns whose logits are asked for: the last layer computes keys and values of all, and
      everything else of these alone.
  """
  each = token_flops(model, length, supervised=0.0, keys=keys)
  heads, kv_heads = model.num_attention_heads, model.kv_heads
  asking = (each.projections * heads / (heads + kv_heads) + each.scores) / model.num_hidden_layers
  if model.num_routed_layers:
    feed_forward = (each.router + each.experts) / model.num_routed_layers
  else:
    feed_forward = each.dense / model.num_dense_layers
  head = 2 * model.hidden_size * model.vocab_size
  return length * each.total - (length - wanted) * (asking + feed_forward) + wanted * head


def train_flops(model: ModelConfig, length: int, *, supervised: float = 1.0) -> float:
  """Per token and training step: forward, and twice as much for the two gradients."""
  return 3 * token_flops(model, length, supervised=supervised).total
