"""A linear map with its derivative, products taken in the layouts that a CPU multiplies fast."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import cpu


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., D] x [D, F] -> [..., F] in the dtype of `x`, accumulated in float32.

  Raises:
    ValueError: for shapes that do not fit.
  """
  if kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
    raise ValueError(f"expected x [..., D] and kernel [D, F], got {x.shape} and {kernel.shape}")
  return jnp.dot(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, kernel):
  return linear(x, kernel), (x, kernel)


def _backward(residuals, grad):
  return lax.platform_dependent(*residuals, grad, cpu=_moved, default=_plain)


def _plain(x, kernel, grad):
  leading = tuple(range(x.ndim - 1))
  dx = jnp.dot(grad, kernel.T, preferred_element_type=jnp.float32)
  dkernel = jnp.tensordot(x, grad, (leading, leading), preferred_element_type=jnp.float32)
  return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _moved(x, kernel, grad):
  rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
  dx = cpu.dot(grads, cpu.transposed(kernel)).reshape(x.shape)
  dkernel = cpu.dot(cpu.transposed(rows), grads)
  return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


linear.defvjp(_forward, _backward)
