"""The small layers: RMSNorm, rotary embedding, projections, the dense feed-forward layer."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.linear import linear
from kernels_pallas.rms_norm import rms_norm


class RMSNorm(nn.Module):
  """x * rsqrt(mean(x^2) + eps), in float32, cast back to the dtype of x, then times the scale.

  The order of the casts is that of the released LLaDA-MoE: the scale multiplies after rounding.
  """

  eps: float
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    return rms_norm(x, scale, self.eps)


def rotary_tables(positions: jax.Array, size: int, theta: float, dtype) -> tuple:
  """cos and sin of position * theta^(-2j / size), j < size / 2.

  Args:
    positions: int32[B, L].
    size: how many dimensions of a head are rotated.
    theta: base of the frequencies.
    dtype: of the result; angles are computed in float32.

  Returns:
    Two arrays [B, L, 1, size / 2].
  """
  frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
  angles = positions.astype(jnp.float32)[..., None, None] * frequencies
  return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary embedding in the half-split layout: dimension j turns with dimension j + size / 2.

  Args:
    x: [B, L, N, H]. Dimensions beyond 2 * cos.shape[-1] pass unrotated (partial rotary).
    cos, sin: from `rotary_tables`.
  """
  half = cos.shape[-1]
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


class Projection(nn.Module):
  """A linear map of the last axes of x, without bias unless asked.

  Attributes:
    features: output axes, e.g. (N, H).
    axes: logical names of the kernel's axes, input axes first.
    inputs: how many trailing axes of x are contracted.
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]
  inputs: int = 1
  use_bias: bool = False
  initializer_range: float = 0.02
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    contracted = x.shape[x.ndim - self.inputs :]
    init = nn.with_logical_partitioning(nn.initializers.normal(self.initializer_range), self.axes)
    kernel = self.param("kernel", init, contracted + self.features, self.param_dtype)
    flat = kernel.astype(x.dtype).reshape(math.prod(contracted), -1)  # [D, F]
    y = linear(x.reshape(*x.shape[: x.ndim - self.inputs], -1), flat)
    y = y.reshape(*y.shape[:-1], *self.features)
    if self.use_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.inputs :])
      y = y + self.param("bias", init, self.features, self.param_dtype).astype(x.dtype)
    return y


class SwiGLU(nn.Module):
  """down(silu(gate x) * up x): the dense feed-forward layer, and a shared expert."""

  width: int
  initializer_range: float = 0.02
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def project(name, features, axes):
      return Projection(
        (features,),
        axes,
        initializer_range=self.initializer_range,
        param_dtype=self.param_dtype,
        name=name,
      )

    gate = project("gate", self.width, ("embed", "mlp"))(x)
    up = project("up", self.width, ("embed", "mlp"))(x)
    return project("down", x.shape[-1], ("mlp", "embed"))(nn.silu(gate) * up)
