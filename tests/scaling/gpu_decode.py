"""Compiles the decoding loop of LLaDA-MoE's shape for Hopper; started by test_decode_block.py."""

import json
import sys

import jax
from decode_loop import arguments, memory_bytes

from kernels_pallas import gpu, op
from lladax.infer.sampler import decode_block
from lladax.models import inference_config, llada_moe_7b_a1b

ROWS, LENGTH, LAYERS = 1, 1088, 2


def main(kind):
  sharding = jax.sharding.SingleDeviceSharding(gpu.compile_only(kind)[0])
  config = inference_config(llada_moe_7b_a1b(num_hidden_layers=LAYERS))
  args, static = arguments(config, ROWS, LENGTH, sharding)
  with op.target(kind):
    lowered = decode_block.trace(*args, **static).lower(lowering_platforms=("cuda",))
  compiled = lowered.compile()
  stats, text = compiled.memory_analysis(), compiled.as_text()
  print(json.dumps({
    "temporaries": stats.temp_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "memory": memory_bytes(config, ROWS, LENGTH),
    "fused_moe": sum(name in text for name in ("fused_moe_swiglu", "fused_moe_down")),
  }))  # fmt: skip


if __name__ == "__main__":
  main(sys.argv[1])
