"""The output head's cross-entropy on a mesh; see `kernels_pallas.cross_entropy`."""

from __future__ import annotations

import jax

from kernels_pallas.cross_entropy import weighted_nll
from lladax.sharding import over_batch_shards


def weighted_nll_on_mesh(hidden, kernel, targets, weights) -> tuple[jax.Array, jax.Array]:
  """`weighted_nll` of hidden states [B, L, D], each device computing its own rows of the batch.

  Returns:
    float32[], float32[B, L].
  """

  def local(hidden, kernel, targets, weights):
    flat = (targets.size,)
    total, nll = weighted_nll(
      hidden.reshape(*flat, -1), kernel, targets.reshape(flat), weights.reshape(flat)
    )
    return total[None], nll.reshape(targets.shape)

  sharded = (True, False, True, True)
  total, nll = over_batch_shards(local, sharded)(hidden, kernel, targets, weights)
  return total.sum(), jax.lax.stop_gradient(nll)
