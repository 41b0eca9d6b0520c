"""The experts' feed-forward layer, the meaning: every expert on every token, weighted one-hot."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expert_ffn(x, gate_up, down, weights, experts) -> jax.Array:
  """y = sum_j weights_j * down_j(silu(gate_j x) * up_j x), densely.

  Args:
    x: [T, D].
    gate_up: [E, D, 2F], gate before up.
    down: [E, F, D].
    weights: float32[T, k].
    experts: int32[T, k], the expert of each slot.

  Returns:
    [T, D] in the dtype of `x`, combined in float32.
  """
  width = down.shape[1]
  hidden = jnp.einsum("td,edf->tef", x, gate_up, preferred_element_type=jnp.float32)
  hidden = jax.nn.silu(hidden[..., :width]) * hidden[..., width:]
  out = jnp.einsum("tef,efd->ted", hidden.astype(x.dtype), down, preferred_element_type=jnp.float32)
  one_hot = jax.nn.one_hot(experts, down.shape[0])  # [T, k, E]
  return jnp.einsum("ted,tke,tk->td", out, one_hot, weights.astype(jnp.float32)).astype(x.dtype)
