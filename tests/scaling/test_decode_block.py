"""The decoding loop, and a step of it, compiled for TPUs and GPUs that are not here."""

import json
import pathlib
import subprocess
import sys

import gpu_toolkit
import jax
import pytest
from decode_loop import arguments, memory_bytes

from kernels_pallas import op
from lladax.config import ConfigError
from lladax.infer.sampler import decode_block
from lladax.models import tiny
from lladax.moe import MoEConfig
from lladax.scaling import aot
from lladax.scaling.chips import parse_slice
from lladax.scaling.decode_steps import abstract_decoder, lower_block_step
from lladax.scaling.memory import shard_bytes
from lladax.sharding import MeshConfig

try:
  aot.require_libtpu()
  missing = ""
except ConfigError as error:
  missing = str(error)
pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(bool(missing), reason=missing)

CONFIG = tiny(
  vocab_size=2048,
  hidden_size=256,
  num_hidden_layers=2,
  num_attention_heads=2,
  moe=MoEConfig(
    num_experts=8, num_experts_per_tok=2, expert_intermediate_size=256, implementation="inference"
  ),
  dtype="bfloat16",
  param_dtype="bfloat16",
  stacked=False,
)


@pytest.fixture(autouse=True)
def checked_values():
  """In place of the check of all tests: kernels are compiled as they run, and that is unchecked."""


@needs_libtpu
def test_keys_and_values_are_updated_in_place():
  rows, length = 2, 256
  device = aot.devices(parse_slice("v5e:2x2"))[0]
  args, static = arguments(CONFIG, rows, length, jax.sharding.SingleDeviceSharding(device))
  with op.target(device.device_kind):
    stats = decode_block.lower(*args, **static).compile().memory_analysis()
  assert stats.alias_size_in_bytes >= memory_bytes(CONFIG, rows, length)
  # Logits of the blocks, and not of the canvas.
  assert stats.temp_size_in_bytes < 4 * rows * length * CONFIG.vocab_size * 4


@needs_libtpu
@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_updates_them_in_place_on_a_mesh(rows):
  slice_ = parse_slice("v5e:2x2")
  mesh = MeshConfig(data=1, tensor=2, expert=2)
  decoder = abstract_decoder(CONFIG, mesh, slice_, aot.devices(slice_), width=64)
  memory = decoder.memory(rows, 256)
  # Heads over tensor, and rows over expert where they divide.
  whole = memory_bytes(CONFIG, rows, 256)
  assert shard_bytes(memory) == whole // (2 if rows == 1 else 4)
  program = lower_block_step(decoder, rows=rows, length=256)
  stats = program.lowered.compile().memory_analysis()
  assert stats.alias_size_in_bytes >= shard_bytes(memory)


@pytest.mark.skipif(gpu_toolkit.MISSING, reason=gpu_toolkit.REASON)
def test_on_hopper_keys_and_values_stay_in_place_and_no_weights_are_copied():
  script = pathlib.Path(__file__).parent / "gpu_decode.py"
  command = [sys.executable, script, "NVIDIA H100 80GB HBM3"]
  ran = subprocess.run(command, capture_output=True, text=True, env=gpu_toolkit.environment())
  assert ran.returncode == 0, ran.stderr[-2000:]
  found = json.loads(ran.stdout.splitlines()[-1])
  assert found["fused_moe"] == 2
  assert found["aliased"] >= found["memory"]
  experts = 64 * 3 * 2048 * 1024 * 2  # bytes of one layer's
  assert found["temporaries"] < experts / 2
