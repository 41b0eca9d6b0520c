"""The experts' feed-forward layer for CPUs: gather, SwiGLU and both products block by block.

A block's activations stay in cache from the gather to the last product. For the backward pass only
the hidden activations are written, one matmul less than computing them again. Against three
separate passes (dispatch, grouped matmuls, combine) a form that recomputed them took 0.68 of the
time forward and 0.78 forward and backward (T 4096, D 256, E 16, F 256, k 2, float32, 2-core
AVX-512 machine).

The combine weight multiplies the hidden activations instead of the output, which is the same sum:
its gradient then needs no saved output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import cpu
from kernels_pallas.op import vary_like


def forward(x, gate_up, down, weights, order, inverse, group_sizes) -> jax.Array:
  """See `kernels_pallas.expert_ffn.api.expert_ffn`."""
  return _forward(x, gate_up, down, weights, order, inverse, group_sizes, keep=False)[0]


def forward_keeping(x, gate_up, down, weights, order, inverse, group_sizes):
  """The output, and the hidden activations as `backward` takes them."""
  return _forward(x, gate_up, down, weights, order, inverse, group_sizes, keep=True)


def _forward(x, gate_up, down, weights, order, inverse, group_sizes, *, keep):
  tokens, slot_weights, block = _slots(weights, order, group_sizes)
  slots, width = order.shape[0] + block, down.shape[1]

  def body(start, live, carry, local):
    out, kept = carry
    gate_up_e, down_e = local
    rows = x[cpu.take_rows(tokens, start, block)]
    hidden = cpu.dot(rows, gate_up_e)
    if keep:
      kept = cpu.put_rows(kept, hidden, start)
    scale = cpu.take_rows(slot_weights, start, block)[:, None]
    act = jax.nn.silu(hidden[:, :width]) * hidden[:, width:] * scale
    out = cpu.put_rows(out, cpu.dot(act.astype(x.dtype), down_e), start)
    return (out, kept), local

  # Rows are stored in float32, as the products give them: storing a block converted to bfloat16
  # takes as long as computing it.
  out = jnp.zeros((slots, x.shape[1]), jnp.float32)
  kept = jnp.zeros((slots, 2 * width), jnp.float32) if keep else None
  out, kept = cpu.for_each_block(
    group_sizes,
    block,
    enter=lambda e: (gate_up[e], down[e]),
    body=body,
    leave=lambda e, carry, local: carry,
    carry=vary_like((out, kept), x, weights, group_sizes),
  )
  return _sum_slots(out, inverse, weights.shape, order.shape[0]).astype(x.dtype), kept


def backward(x, gate_up, down, weights, order, inverse, group_sizes, hidden, grad):
  """Gradients of x, gate_up, down and weights, given that of the output [T, D].

  hidden: float32[T * k and room for a last whole block, 2F], from `forward_keeping`.
  """
  tokens, slot_weights, block = _slots(weights, order, group_sizes)
  slots, width, dtype = order.shape[0], down.shape[1], x.dtype
  float32 = jnp.float32
  refs = x, weights, group_sizes, grad

  def enter(e):
    # Transposed once per expert: products with the transposed matrix on the right are slower.
    zeros = jnp.zeros(gate_up.shape[1:], float32), jnp.zeros(down.shape[1:], float32)
    zeros = vary_like(zeros, *refs)
    return cpu.transposed(gate_up[e]), cpu.transposed(down[e]), *zeros

  def body(start, live, carry, local):
    dx, dweights, dgate_up, ddown = carry
    gate_up_t, down_t, dgate_up_e, ddown_e = local
    token = cpu.take_rows(tokens, start, block)
    scale = cpu.take_rows(slot_weights, start, block)[:, None]
    rows = x[token]
    # Only the group's own rows may reach the sums over rows below.
    dout = jnp.where(live[:, None], grad[token], 0)

    kept = cpu.take_rows(hidden, start, block)
    gate, up = kept[:, :width], kept[:, width:]
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    dact_scaled = cpu.dot(dout, down_t)
    dact = dact_scaled * scale
    dgate = dact * up * (sigmoid + silu * (1 - sigmoid))
    dhidden = jnp.concatenate([dgate, dact * silu], axis=1).astype(dtype)

    ddown_e += cpu.dot(cpu.transposed(act * scale).astype(dtype), dout)
    dgate_up_e += cpu.dot(cpu.transposed(rows), dhidden)
    dx = cpu.put_rows(dx, cpu.dot(dhidden, gate_up_t), start)
    dweights = cpu.put_rows(dweights, cpu.row_sum(act * dact_scaled), start)
    carry = dx, dweights, dgate_up, ddown
    return carry, (gate_up_t, down_t, dgate_up_e, ddown_e)

  def leave(e, carry, local):
    dx, dweights, dgate_up, ddown = carry
    dgate_up = dgate_up.at[e].set(local[2].astype(dgate_up.dtype))
    return dx, dweights, dgate_up, ddown.at[e].set(local[3].astype(ddown.dtype))

  carry = (
    jnp.zeros((slots + block, x.shape[1]), float32),
    jnp.zeros(slots + block, float32),
    jnp.zeros_like(gate_up),
    jnp.zeros_like(down),
  )
  dx, dweights, dgate_up, ddown = cpu.for_each_block(
    group_sizes, block, enter=enter, body=body, leave=leave, carry=vary_like(carry, *refs)
  )
  dx = _sum_slots(dx, inverse, weights.shape, slots).astype(dtype)
  dweights = _at_slots(dweights, inverse, slots).reshape(weights.shape).astype(weights.dtype)
  return dx, dgate_up, ddown, dweights


def _slots(weights, order, group_sizes):
  """Token and weight of every slot in expert order, padded by one block."""
  block = cpu.block_rows(order.shape[0], group_sizes.shape[0])
  order = jnp.minimum(jnp.pad(order, (0, block)), weights.size - 1)
  return order // weights.shape[1], weights.reshape(-1).astype(jnp.float32)[order], block


def _at_slots(rows, inverse, count):
  """What stands at each slot's place among the first `count` rows, zero where it has none there."""
  places = jnp.where(inverse < count, inverse, rows.shape[0])
  return rows.at[places].get(mode="fill", fill_value=0)


def _sum_slots(rows, inverse, shape, count):
  """[R, D] in expert order -> the sum over each token's k slots in float32, [T, D]."""
  return _at_slots(rows, inverse, count).reshape(*shape, -1).sum(1, dtype=jnp.float32)
