"""A step of decoding compiles for a TPU, and copies no layer's weights."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels_pallas import op
from lladax.models import Denoiser, Memory, abstract_params, llada_moe_7b_a1b
from lladax.models.cache import KeyValues

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
LENGTH, WIDTH, LAYERS = 1088, 64, 2


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_layers_apart_are_not_copied(stacked):
  """Stacked ones are, which is what `for_inference` takes them apart for."""
  pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu (extra plan)")
  device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
  here = SingleDeviceSharding(device)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

  config = llada_moe_7b_a1b(
    param_dtype="bfloat16", num_hidden_layers=LAYERS, remat="none", stacked=stacked
  )
  moe = dataclasses.replace(config.moe, implementation="fused_moe")
  config = dataclasses.replace(config, moe=moe)
  params = jax.tree.map(lambda x: array(x.shape, x.dtype), abstract_params(config))
  kept = array((LAYERS, 1, LENGTH, 16, 128)[0 if stacked else 1 :], jnp.bfloat16)
  kept = KeyValues(kept, kept) if stacked else (KeyValues(kept, kept),) * LAYERS
  ids, row = array((1, LENGTH), jnp.int32), array((1,), jnp.int32)

  def step(params, tokens, positions, segment_ids, at, memory):
    return Denoiser(config).read_window(
      params, tokens, positions, segment_ids,
      at=at, width=WIDTH, memory=memory, start=at, size=WIDTH,
    )  # fmt: skip

  with op.target(device.device_kind):
    lowered = jax.jit(step, donate_argnums=5).lower(params, ids, ids, ids, row, Memory(None, kept))
    compiled = lowered.compile()
  experts = 64 * 3 * 2048 * 1024 * 2  # bytes of one layer's
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert temporaries > 0.9 * experts if stacked else temporaries < 0.1 * experts
