"""The experts' layer for decoding: signature, checks, and which implementation runs where."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import op
from kernels_pallas.fused_moe import active_blocks, reference
from kernels_pallas.fused_moe.quantize import QuantizedExperts, Weights

IMPLEMENTATIONS = ("active_blocks", "pallas_tpu", "pallas_gpu", "reference")


# Slots per expert, on average, up to which `fused_moe` takes less time than `expert_ffn`. On a CPU as
# measured (see `active_blocks`). On accelerators a weight of 2 bytes is then used in 64 operations,
# far from what they could do while they read it.
FEW = 32
FEW_CONVERTED = 128  # on a CPU in bfloat16 or eight bits
MOST_TOKENS = 512  # what a TPU's kernel has room for


def is_faster(tokens: int, k: int, weights: Weights, dtype, *, devices: int = 1) -> bool:
  """Whether `fused_moe` is the faster op on the platform that is traced for.

  Args:
    tokens: T.
    k: experts per token.
    weights: gate_up or down.
    dtype: of the activations.
    devices: over so many the tokens' experts are spread, those of `weights` being of one.
  """
  quantized = isinstance(weights, QuantizedExperts)
  few = FEW
  if op.target_platform() == "cpu":
    few = FEW if jnp.dtype(dtype) == jnp.float32 and not quantized else FEW_CONVERTED
  elif tokens > MOST_TOKENS:
    return False
  elif quantized:  # the other op would first write all of them in 16 bits
    return True
  return tokens * k <= few * weights.shape[0] * devices


def fused_moe(
  x: jax.Array,
  gate_up: Weights,
  down: Weights,
  weights: jax.Array,
  experts: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """y_t = sum_j weights_tj * down_j(silu(gate_j x_t) * up_j x_t), for inference on few tokens.

  With few tokens the time is that of reading weights. Each expert that some token chose is read
  once, the others never. The same values as `kernels_pallas.expert_ffn`, which is for training and
  for many tokens. A token's result does not depend on the other tokens, to the last bit.

  Args:
    x: [T, D], T from one to a few hundred.
    gate_up: [E, D, 2F], gate before up, in the dtype of `x`, or `QuantizedExperts`.
    down: [E, F, D], likewise.
    weights: float32[T, k].
    experts: int32[T, k], the experts of each token, distinct. Outside [0, E): the expert is
      elsewhere (on another device), and the slot adds nothing here.
    implementation: one of `IMPLEMENTATIONS`; None chooses by the platform that is lowered for:
      `active_blocks` on CPU, `pallas_tpu` on TPU, `pallas_gpu` on CUDA.

  Returns:
    [T, D] in the dtype of `x`; products and the combine are summed in float32.

  Raises:
    ValueError: for shapes or dtypes that do not fit or an unknown implementation.
    NotImplementedError: when differentiated.
  """
  _check(x, gate_up, down, weights, experts)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
  if not x.shape[0]:
    return x
  return _fused_moe(implementation, x, gate_up, down, weights, experts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fused_moe(implementation, *args):
  if implementation is None:
    return op.by_platform(*args, cpu=active_blocks.forward, tpu=_pallas_tpu, cuda=_pallas_gpu)
  if implementation in _ONLY_ON:
    platform, function = _ONLY_ON[implementation]
    return op.only_on(platform, implementation, function, *args)
  return (active_blocks if implementation == "active_blocks" else reference).forward(*args)


@_fused_moe.defjvp
def _no_derivative(implementation, primals, tangents):
  raise NotImplementedError(
    "fused_moe is for inference and has no derivative; use kernels_pallas.expert_ffn, which gives "
    "the same values"
  )


def _pallas_tpu(*args):
  from kernels_pallas.fused_moe import pallas_tpu

  return pallas_tpu.forward(*args)


def _pallas_gpu(*args):
  from kernels_pallas.fused_moe import pallas_gpu

  return pallas_gpu.forward(*args)


_ONLY_ON = {"pallas_tpu": ("tpu", _pallas_tpu), "pallas_gpu": ("cuda", _pallas_gpu)}


def _check(x, gate_up, down, weights, experts):
  if x.ndim != 2 or len(down.shape) != 3:
    raise ValueError(f"expected x [T, D] and down [E, F, D], got {x.shape} and {down.shape}")
  (tokens, depth), (count, width, _) = x.shape, down.shape
  if gate_up.shape != (count, depth, 2 * width) or down.shape[2] != depth:
    raise ValueError(
      f"expected gate_up [E, D, 2F] and down [E, F, D] for x {x.shape}, "
      f"got {gate_up.shape} and {down.shape}"
    )
  if weights.ndim != 2 or weights.shape[0] != tokens or experts.shape != weights.shape:
    raise ValueError(
      f"expected weights and experts [{tokens}, k], got {weights.shape} and {experts.shape}"
    )
  if not jnp.issubdtype(experts.dtype, jnp.integer):
    raise ValueError(f"expected experts to be integers, got {experts.dtype}")
  for name, matrices in (("gate_up", gate_up), ("down", down)):
    if isinstance(matrices, QuantizedExperts):
      expected = (count, matrices.shape[2])
      if matrices.scales.shape != expected:
        raise ValueError(f"expected scales of {name} {expected}, got {matrices.scales.shape}")
    elif matrices.dtype != x.dtype:
      raise ValueError(
        f"expected {name} in the dtype of x, {x.dtype}, got {matrices.dtype}; convert it once, not "
        "per call, or pass `quantize`d weights"
      )
