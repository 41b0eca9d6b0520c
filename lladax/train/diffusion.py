"""The train step of masked diffusion: what `make_train_step` is given for a model and an objective."""

from __future__ import annotations

import jax
import optax

from lladax.diffusion import Objective, masked_nll, time_buckets
from lladax.models import ModelConfig, bind_token_nll, count_load
from lladax.train.routing import router_metrics
from lladax.train.state import TrainState
from lladax.train.step import Balance, make_train_step
from lladax.types import Batch, Sums


def make_diffusion_step(
  model: ModelConfig,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  microbatches: int = 1,
  learning_rate: optax.Schedule | None = None,
  shardings: TrainState | None = None,
):
  """The jitted step `(state, batch) -> (state, metrics)`; see `make_train_step`.

  Args:
    model: the network; `mask_token_id` is what masks.
    objective: noise, loss and the router's losses.
    seed: of the noise, which is a function of it, the step and the row of the batch.
  """

  def prepare(batch: Batch, step: jax.Array):
    return batch, objective.noise(batch, seed, step, mask_id=model.mask_token_id)

  def loss(params, examples, share: float, load_share: jax.Array | None = None):
    batch, noised = examples
    groups = time_buckets(noised.t)
    token_nll = bind_token_nll(model, params, batch.positions, batch.segment_ids, groups)
    total, sums, stats = masked_nll(
      token_nll, batch, noised, objective=objective, share=share, load_share=load_share
    )
    if stats is None:
      return total, sums
    router = router_metrics(stats, share, may_drop=model.moe.exchange.may_drop)
    return total, Sums(sums.sums | router.sums, sums.counts | router.counts)

  def count(params, examples) -> jax.Array:
    batch, noised = examples
    return count_load(model, params, noised.tokens, batch.positions, batch.segment_ids)

  balance = None
  if model.num_routed_layers and objective.balance_loss:
    balance = Balance(choose=objective.balance_load, count=count)
  return make_train_step(
    prepare,
    loss,
    optimizer,
    microbatches=microbatches,
    learning_rate=learning_rate,
    shardings=shardings,
    balance=balance,
  )
