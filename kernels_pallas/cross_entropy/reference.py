"""The head's cross-entropy, the meaning: all logits in float32 and a log-softmax over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def weighted_nll(hidden, kernel, targets, weights) -> tuple[jax.Array, jax.Array]:
  """sum_i weights_i * nll_i and nll_i, written out; see `api.weighted_nll`."""
  logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)  # [T, V]
  targets = jnp.clip(targets, 0, kernel.shape[1] - 1)
  picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  nll = jnp.where(weights != 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
  return jnp.vdot(lax.stop_gradient(weights), nll), lax.stop_gradient(nll)
