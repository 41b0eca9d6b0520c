"""The small layers: RMSNorm, rotary embedding, projections, the dense feed-forward layer."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.linear import linear
from kernels_pallas.op import vary_like
from kernels_pallas.rms_norm import rms_norm
from lladax.sharding import axes_in, axes_of, gather, joined, keep, on_devices, spec, total


class RMSNorm(nn.Module):
  """x * rsqrt(mean(x^2) + eps), in float32, cast back to the dtype of x, then times the scale.

  The order of the casts is that of the released LLaDA-MoE: the scale multiplies after rounding.

  Attributes:
    eps: added to the mean square.
    axes: logical names of the axes of x.
    param_dtype: of the scale.
  """

  eps: float
  axes: tuple[str | None, ...] = ("batch", "length", "activation")
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    rows, whole = spec(x.shape, *self.axes), spec(scale.shape, "norm")

    def local(x, scale):
      return rms_norm(x, vary_like(scale, x), self.eps)

    return on_devices(local, (rows, whole), rows, x, scale)


class Embedding(nn.Module):
  """The table of embeddings: tokens int32[B, L] -> [B, L, D] in `dtype`.

  A device holds some columns of every row of the table. It looks up those columns for the tokens of
  all devices that it shares the table with, and each gets its own rows back: the ids travel, and
  T * D numbers, never the table. (`nn.Embed` in all but that.)
  """

  vocab_size: int
  width: int
  dtype: jnp.dtype
  initializer_range: float = 0.02
  param_dtype: jnp.dtype = jnp.float32

  AXES = ("vocab_rows", "embed_columns")

  def setup(self):
    init = nn.initializers.normal(self.initializer_range)
    init = nn.with_logical_partitioning(init, self.AXES)
    self.embedding = self.param("embedding", init, (self.vocab_size, self.width), self.param_dtype)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    table = self.embedding
    table_spec, rows = spec(table.shape, *self.AXES), spec(tokens.shape, "batch", "length")
    stays = keep(table_spec, axes_in(*rows))[1]
    travels = [axis for axis in axes_of(table_spec[1]) if axis not in axes_of(stays)]

    def local(table, tokens):
      ids = tokens.reshape(-1)
      for axis in travels:
        if axis in axes_in(*rows):
          ids = jax.lax.all_gather(ids, axis, tiled=True)
      # Cast after the lookup: MASK is half of all tokens, and its gradient is summed in the dtype of
      # the table.
      x = table[ids].astype(self.dtype)
      for axis in reversed(travels):  # minor first
        if axis in axes_in(*rows):
          x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True)
        else:
          x = jax.lax.all_gather(x, axis, axis=1, tiled=True, to="invarying")
      return x.reshape(*tokens.shape, -1)

    return on_devices(local, (table_spec, rows), joined(*rows, stays), table, tokens)


@struct.dataclass
class RotaryPositions:
  """Where the tokens of a pass stand.

  Attributes:
    positions: int32[B, L].
    rotary: cos and sin [B, L, 1, H / 2] there, see `rotary_tables`.
  """

  positions: jax.Array
  rotary: tuple[jax.Array, jax.Array]


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
  """A linear map of the last axes of x [B, L, ...], without bias unless asked.

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
    inputs = self.inputs
    init = nn.with_logical_partitioning(nn.initializers.normal(self.initializer_range), self.axes)
    shape = x.shape[x.ndim - inputs :] + self.features
    kernel = self.param("kernel", init, shape, self.param_dtype)
    y = project(x, kernel, self.axes, inputs=inputs)
    if self.use_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[inputs:])
      y = y + self.param("bias", init, self.features, self.param_dtype).astype(x.dtype)
    return y


def project(x: jax.Array, kernel: jax.Array, axes: tuple[str, ...], *, inputs=1, dtype=None):
  """x [B, L, inputs...] times kernel [inputs..., features...] on the mesh in use.

  Args:
    x: rows over the batch axes and the sequence over context, where they divide.
    kernel: cast to the dtype of `x`.
    axes: logical names of the kernel's axes.
    inputs: how many axes are contracted.
    dtype: of the result; that of `x` if None. Products are summed in float32.

  Returns:
    [B, L, features...].
  """
  lead, lies = spec(x.shape[:2], "batch", "length"), spec(kernel.shape, *axes)
  rows = axes_in(*lead)
  stays = keep(lies, rows)
  contracted = axes_in(*stays[:inputs])

  def local(x, kernel):
    kernel = gather(kernel.astype(x.dtype), lies, rows)
    features = kernel.shape[inputs:]
    flat = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)  # [D, F]
    flat_x = x.reshape(*x.shape[:2], -1)
    flat_x, flat = vary_like((flat_x, flat), flat_x, flat)
    if dtype is None:
      y = linear(flat_x, flat)
    else:
      y = jnp.dot(flat_x, flat, preferred_element_type=dtype)
    return total(y, contracted).reshape(*x.shape[:2], *features)

  of_x, of_y = joined(*lead, *stays[:inputs]), joined(*lead, *stays[inputs:])
  return on_devices(local, (of_x, lies), of_y, x, kernel)


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
