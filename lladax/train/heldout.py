"""The bound on held-out text: how well a model compresses what it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lladax.data import Data
from lladax.diffusion import log_likelihood_bound
from lladax.models import ModelConfig, bind_token_nll
from lladax.sharding import own_rows
from lladax.train.loop import place
from lladax.types import Batch


def heldout_bound(
  model: ModelConfig,
  data: Data,
  mesh: jax.sharding.Mesh,
  *,
  mc_num: int = 8,
  seed: int = 0,
  max_batches: int | None = None,
) -> Callable[[Any], dict[str, float]]:
  """params -> the Monte-Carlo bound on held-out text, with the same masks at every call.

  The result has `heldout/nll`, nats per token; `heldout/bits_per_byte`, where the tokenizer tells
  the bytes of a token; and `heldout/tokens`, how many were scored. Rows are scored apart, each
  without the text before it.

  Args:
    model: the architecture.
    data: its held-out rows are scored, in batches of the training batch's size.
    mesh: the mesh in force, over which rows are spread.
    mc_num: samples of the mask per row, spread evenly over all numbers of masked tokens.
    seed: of the masks.
    max_batches: score only so many batches, from the first; None: all.
  """
  byte_lengths, size = data.tokenizer.byte_lengths, data.config.batch_size

  @jax.jit
  def score(params, batch: Batch, first: jax.Array):
    bound = log_likelihood_bound(
      bind_token_nll(model, params, batch.positions, batch.segment_ids),
      batch,
      seed=seed,
      mask_id=model.mask_token_id,
      mc_num=mc_num,
      row_ids=first + jnp.arange(size, dtype=jnp.uint32),
    )
    table = jnp.zeros(model.vocab_size, jnp.int32) if byte_lengths is None else byte_lengths
    num_bytes = jnp.where(batch.maskable, jnp.asarray(table)[batch.tokens], 0)
    return -bound.sum(), batch.maskable.sum(), num_bytes.sum()

  def evaluate(params) -> dict[str, float]:
    totals = np.zeros(3)
    for index, batch in enumerate(data.heldout_iterator(rows=own_rows(mesh, size))):
      if index == max_batches:
        break
      scored = score(params, place(batch, mesh), jnp.uint32(index * size))
      totals += np.array(jax.device_get(scored), np.float64)
    nats, tokens, num_bytes = totals
    result = {"heldout/nll": nats / tokens, "heldout/tokens": int(tokens)}
    if byte_lengths is not None:
      result["heldout/bits_per_byte"] = nats / math.log(2) / num_bytes
    return result

  return evaluate
