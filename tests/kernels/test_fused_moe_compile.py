"""The decoding kernels compile for every TPU and lower for CUDA, and copy no weights."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels_pallas import op
from kernels_pallas.fused_moe import QuantizedExperts, fused_moe

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Tokens, D, F, E, k. LLaDA-MoE-7B-A1B; LLaDA2.0-flash; one that tiles do not divide.
LLADA_MOE, FLASH, ODD = (2048, 1024, 64, 8), (4096, 1024, 256, 8), (200, 72, 4, 2)


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def shapes(tokens, model, dtype, stored, sharding=None):
  depth, width, count, k = model

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  gate_up, down = array((count, depth, 2 * width), stored), array((count, width, depth), stored)
  if stored != dtype:
    gate_up, down = (
      QuantizedExperts(values=w, scales=array((count, w.shape[2]), jnp.float32))
      for w in (gate_up, down)
    )
  x, weights = array((tokens, depth), dtype), array((tokens, k), jnp.float32)
  return x, gate_up, down, weights, array((tokens, k), jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize(
  "chip, tokens, model, dtype, stored",
  [
    ("v5e", 32, LLADA_MOE, jnp.bfloat16, jnp.bfloat16),
    ("v5p", 256, LLADA_MOE, jnp.bfloat16, jnp.bfloat16),
    ("v6e", 32, LLADA_MOE, jnp.bfloat16, jnp.int8),
    ("tpu7x", 32, LLADA_MOE, jnp.bfloat16, jnp.float8_e4m3fn),
    *(
      slow(chip, *case)
      for chip in TOPOLOGIES
      for case in [
        (1, LLADA_MOE, jnp.bfloat16, jnp.bfloat16),
        (512, FLASH, jnp.bfloat16, jnp.bfloat16),
        (512, FLASH, jnp.bfloat16, jnp.int8),
        (128, FLASH, jnp.bfloat16, jnp.float8_e4m3fn),
        (64, LLADA_MOE, jnp.float32, jnp.float32),
        (16, ODD, jnp.bfloat16, jnp.bfloat16),
      ]
    ),
  ],
)
def test_compiles_for_tpu(chip, tokens, model, dtype, stored):
  pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu (extra plan)")
  device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
  args = shapes(tokens, model, dtype, stored, SingleDeviceSharding(device))
  with op.target(device.device_kind):
    compiled = jax.jit(fused_moe).lower(*args).compile()
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[1:3]))
  depth, _, count, k = model
  active = min(count, tokens * k) / count
  if model is ODD:
    return  # its weights are padded in a copy
  # Less than one expert: there is no copy of the weights, nor of a part of them.
  assert memory.temp_size_in_bytes < 12 * tokens * depth * 4 + weights / count
  assert active * weights <= cost["bytes accessed"] <= 1.05 * active * weights + 100 * 2**20


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float32])
@pytest.mark.parametrize("tokens, model", [(64, LLADA_MOE), (3, ODD)])
def test_lowers_for_cuda(tokens, model, stored):
  dtype = stored if stored == jnp.float32 else jnp.bfloat16
  with op.target("NVIDIA H100 80GB HBM3"):
    traced = jax.jit(fused_moe).trace(*shapes(tokens, model, dtype, stored))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("__gpu$xla.gpu.triton") == 2
