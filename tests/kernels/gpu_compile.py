"""Compiles every GPU kernel for Hopper, without a GPU; started by test_gpu_compile.py.

Prints a line of JSON per kernel.
"""

import json
import sys

import jax
import jax.numpy as jnp

from kernels_pallas import expert_ffn, fused_moe, gpu, op
from kernels_pallas.grouped_matmul import mosaic_gpu, triton
from kernels_pallas.permute import pallas_gpu

# LLaDA-MoE: rows, tokens, slots, experts, D, F.
R, T, K, E, D, F = 65536, 8192, 8, 64, 2048, 1024
i32, f32, bf16 = jnp.int32, jnp.float32, jnp.bfloat16
LEFT, GRAD, SIZES = ((R, D), bf16), ((R, F), bf16), ((E,), i32)
MATRIX, GATE_UP, DOWN = ((E, D, F), bf16), ((E, D, 2 * F), bf16), ((E, F, D), bf16)


def layer(x, gate_up, down, weights, order, inverse, sizes):
  def loss(*args):
    return expert_ffn.expert_ffn(*args, order, inverse, sizes).astype(f32).sum()

  return jax.grad(loss, (0, 1, 2, 3))(x, gate_up, down, weights)


def kernels():
  """(name, function, operands as (shape, dtype))."""
  for backend in (mosaic_gpu, triton):
    name = backend.__name__.rsplit(".", 1)[-1]
    yield f"{name} forward", backend.forward, (LEFT, MATRIX, SIZES)

    def transposed(*args, backend=backend):
      return backend.forward(*args, transpose_rhs=True)

    def gradient(*args, backend=backend):
      return backend.gradient_rhs(*args, dtype=bf16)

    def swiglu(*args, backend=backend):
      return backend.swiglu(*args, keep=True)

    yield f"{name} transposed", transposed, (GRAD, MATRIX, SIZES)
    yield f"{name} gradient_rhs", gradient, (LEFT, GRAD, SIZES)
    yield f"{name} swiglu", swiglu, (LEFT, GATE_UP, SIZES)
  rows, tokens, scale = ((R,), i32), ((T, D), bf16), ((R,), f32)
  weights = ((T, K), f32)
  yield "gather", pallas_gpu.gather, (tokens, rows)
  yield "gather_scaled", pallas_gpu.gather_scaled, (tokens, rows, scale, LEFT)
  yield "weighted_combine", pallas_gpu.weighted_combine, (LEFT, weights, ((T, K), i32))
  yield "expert_ffn, gradients", layer, (tokens, GATE_UP, DOWN, weights, rows, rows, SIZES)
  few = ((64, D), bf16), ((64, K), f32), ((64, K), i32)

  def decode(x, weights, experts, gate_up, down, narrow=None):
    if narrow is not None:
      gate_up, down = fused_moe.quantize(gate_up, down, narrow)
    return fused_moe.fused_moe(x, gate_up, down, weights, experts)

  for narrow in (None, jnp.int8, jnp.float8_e4m3fn):
    run = lambda *args, narrow=narrow: decode(*args, narrow=narrow)  # noqa: E731
    yield f"fused_moe {narrow and jnp.dtype(narrow).name}", run, (*few, GATE_UP, DOWN)


def main(kind):
  sharding = jax.sharding.SingleDeviceSharding(gpu.compile_only(kind)[0])
  for name, function, operands in kernels():
    args = [jax.ShapeDtypeStruct(*x, sharding=sharding) for x in operands]
    row = dict(name=name)
    try:
      with op.target(kind):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
      compiled = lowered.compile()
      row["temp"] = compiled.memory_analysis().temp_size_in_bytes
    except Exception as error:
      row["error"] = f"{type(error).__name__}: {error}"[:500]
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
