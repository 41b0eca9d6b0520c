"""The output head's cross-entropy, computed only where it counts and in blocks of rows.

Masked diffusion supervises masked positions alone, about half of them in pre-training. Rows with
a weight are sorted to the front; a loop of dynamic length visits blocks of them. No [T, V] array
exists, and the gradient is taken in the same pass, as the weights are known: three products with
the head's matrix instead of four.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.cpu import dot, put_rows, take_rows, transposed
from lladax.sharding import over_batch_shards

BLOCK_ROWS = 256


@jax.custom_vjp
def weighted_nll(
  hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """sum_i weights_i * nll_i and nll_i = -log softmax(hidden_i kernel)[targets_i].

  Differentiable in `hidden` and `kernel` through the first result; the second carries none.

  Args:
    hidden: [T, D].
    kernel: [D, V].
    targets: int32[T].
    weights: float32[T]. Rows of weight 0 are not computed, and their targets may be any number.

  Returns:
    float32[] and float32[T], the latter 0 where the weight is 0.
  """
  total, nll, _ = _visit(hidden, kernel, targets, weights, with_gradient=False)
  return total, nll


def _forward(hidden, kernel, targets, weights):
  total, nll, gradients = _visit(hidden, kernel, targets, weights, with_gradient=True)
  return (total, nll), gradients


def _backward(gradients, cotangents):
  scale = cotangents[0]
  return (*(scale.astype(g.dtype) * g for g in gradients), None, None)


weighted_nll.defvjp(_forward, _backward)


def _visit(hidden, kernel, targets, weights, *, with_gradient):
  rows, width = hidden.shape
  block = min(BLOCK_ROWS, rows)
  counted = weights != 0
  order = jnp.argsort(~counted, stable=True)
  order = jnp.pad(order, (0, block), constant_values=rows)  # out of range: read as the last row
  blocks = (counted.sum() + block - 1) // block
  kernel_t = _transposed(kernel) if with_gradient else None
  gradients = (
    (jnp.zeros((rows + block, width), hidden.dtype), jnp.zeros(kernel.shape, jnp.float32))
    if with_gradient
    else ()
  )

  def visit(i, carry):
    total, nll, gradients = carry
    start = i * block
    index = take_rows(order, start, block)
    row = hidden.at[index].get(mode="clip")
    weight = weights.at[index].get(mode="fill", fill_value=0)
    target = targets.at[index].get(mode="clip")
    logits = dot(row, kernel)  # [block, V]
    # One pass each over the logits: the largest is held still, as in any softmax.
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    exps = jnp.exp(logits - peak)
    norm = exps.sum(-1, keepdims=True)
    picked = jnp.take_along_axis(logits, target[:, None], axis=-1)
    # The last block ends in rows without a weight, whose targets may be no ids at all.
    loss = jnp.where(weight != 0, (jnp.log(norm) + peak - picked)[:, 0], 0)
    total = total + jnp.vdot(weight, loss)
    nll = put_rows(nll, loss, start)
    if with_gradient:
      hot = jnp.arange(logits.shape[-1]) == target[:, None]
      dlogits = (exps * (weight[:, None] / norm) - jnp.where(hot, weight[:, None], 0)).astype(
        hidden.dtype
      )
      dhidden, dkernel = gradients
      dhidden = put_rows(dhidden, dot(dlogits, kernel_t), start)
      gradients = (dhidden, dkernel + dot(_transposed(row), dlogits))
    return total, nll, gradients

  carry = jnp.zeros(()), jnp.zeros(rows + block), gradients
  total, nll, gradients = lax.fori_loop(0, blocks, visit, carry)
  inverse = jnp.zeros(rows, jnp.int32).at[order[:rows]].set(jnp.arange(rows))
  if with_gradient:
    dhidden, dkernel = gradients
    gradients = (dhidden[inverse], dkernel.astype(kernel.dtype))
  return total, nll[inverse], gradients


def _transposed(x):
  return lax.platform_dependent(x, cpu=transposed, default=jnp.transpose)


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
