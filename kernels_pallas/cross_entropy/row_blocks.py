"""Cross-entropy computed only where it counts and in blocks of rows.

Masked diffusion supervises masked positions alone, about half of them in pre-training. Rows with
a weight are sorted to the front; a loop of dynamic length visits blocks of them. No [T, V] array
exists, and the gradient is taken in the same pass, as the weights are known: three products with
the head's matrix instead of four.

How many rows a block has: on a CPU as many as are needed to multiply at full speed, since logits
should stay in its caches. Where products are fast it is the memory's traffic that counts: each
block reads the matrix twice and reads and writes its float32 gradient, 12 bytes for each of D * V
numbers, for 6 * b operations on each. At b = 256 that is 128 operations per byte, half of what an
H100 can do in the time (990 TFLOP/s, 3.35 TB/s: 295); at 1024 it is 512. Twice as many would save a
quarter of all traffic (that of logits remains), and lose as much in the last block, half empty on
average, where some 4096 rows have a weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.cpu import dot, put_rows, take_rows, transposed
from kernels_pallas.op import vary_like

BLOCK_ROWS = 256
ACCELERATOR_BLOCK_ROWS = 1024


def visit(hidden, kernel, targets, weights, *, with_gradient, block_rows=None):
  """See `api.weighted_nll`: total, nll and, if asked for, the gradients of hidden and kernel.

  Without `block_rows` blocks are for a CPU.
  """
  rows, width = hidden.shape
  block = min(block_rows or BLOCK_ROWS, rows)
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

  def body(i, carry):
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
  carry = vary_like(carry, hidden, kernel, targets, weights)
  carry = vary_like(carry, hidden, kernel, targets, weights)
  with jax.named_scope("cross_entropy_blocks"):
    total, nll, gradients = lax.fori_loop(0, blocks, body, carry)
  inverse = jnp.zeros(rows, jnp.int32).at[order[:rows]].set(jnp.arange(rows))
  if with_gradient:
    dhidden, dkernel = gradients
    gradients = (dhidden[inverse], dkernel.astype(kernel.dtype))
  return total, nll[inverse], gradients


def _transposed(x):
  return lax.platform_dependent(x, cpu=transposed, default=jnp.transpose)
