"""The decoding loop, and a step of it, compiled by libtpu for TPUs that are not here."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import op
from lladax.config import ConfigError
from lladax.infer import DualCache, SamplerConfig, Threshold
from lladax.infer.iteration import Ids
from lladax.infer.sampler import decode_block
from lladax.infer.state import State
from lladax.models import Denoiser, init_variables, tiny
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
pytestmark = [pytest.mark.skipif(bool(missing), reason=missing), pytest.mark.slow]

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
SAMPLER = SamplerConfig(
  gen_length=128, steps=128, block_length=64, cache=DualCache(), unmask=Threshold(0.9)
)


@pytest.fixture(autouse=True)
def checked_values():
  """In place of the check of all tests: kernels are compiled as they run, and that is unchecked."""


def test_keys_and_values_are_updated_in_place():
  rows, length = 2, 256
  device = aot.devices(parse_slice("v5e:2x2"))[0]
  sharding = jax.sharding.SingleDeviceSharding(device)

  def shaped(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

  def state():
    canvas, row = jnp.zeros((rows, length), jnp.int32), jnp.zeros(rows, jnp.int32)
    return State(
      tokens=canvas, segment_ids=canvas, given=canvas > 0, first=row, column=row, end=row,
      keys=jax.vmap(jax.random.key)(row.astype(jnp.uint32)), block=row, revealed_at=canvas,
      confidence=canvas.astype(jnp.float32), iterations=row, nfe=row,
      memory=Denoiser(CONFIG).empty_memory(rows, length),
    )  # fmt: skip

  params = jax.eval_shape(
    lambda: nn.meta.unbox(init_variables(CONFIG, jax.random.key(0))["params"])
  )
  with op.target(device.device_kind):
    lowered = decode_block.lower(
      Denoiser(dataclasses.replace(CONFIG)), shaped(params), shaped(jax.eval_shape(state)),
      config=SAMPLER, ids=Ids(mask=0, eos=(1,)), rest=0,
    )  # fmt: skip
  stats = lowered.compile().memory_analysis()
  memory = 2 * 2 * CONFIG.num_hidden_layers * rows * length * CONFIG.kv_heads * CONFIG.head_size
  assert stats.alias_size_in_bytes >= memory
  # Logits of the blocks, and not of the canvas.
  assert stats.temp_size_in_bytes < 4 * rows * length * CONFIG.vocab_size * 4


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_updates_them_in_place_on_a_mesh(rows):
  slice_ = parse_slice("v5e:2x2")
  mesh = MeshConfig(data=1, tensor=2, expert=2)
  decoder = abstract_decoder(CONFIG, mesh, slice_, aot.devices(slice_), width=64)
  memory = decoder.memory(rows, 256)
  # Heads over tensor, and rows over expert where they divide.
  whole = 2 * 2 * CONFIG.num_hidden_layers * rows * 256 * CONFIG.kv_heads * CONFIG.head_size
  assert shard_bytes(memory) == whole // (2 if rows == 1 else 4)
  program = lower_block_step(decoder, rows=rows, length=256)
  stats = program.lowered.compile().memory_analysis()
  assert stats.alias_size_in_bytes >= shard_bytes(memory)
