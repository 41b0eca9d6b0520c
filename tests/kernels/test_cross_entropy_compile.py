"""The head's cross-entropy compiled for TPUs without having one: no logits in memory."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from kernels_pallas import op
from kernels_pallas.cross_entropy import weighted_nll

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# A chip's tokens, and the output head of LLaDA-MoE.
T, D, V = 8192, 2048, 157184
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compiled(generation, implementation=None, rows=T, width=D, vocabulary=V, dtype=jnp.bfloat16):
  """Total, nll and gradients of hidden and kernel."""
  topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
  device = topology.devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  arrays = (
    ((rows, width), dtype),
    ((width, vocabulary), dtype),
    ((rows,), jnp.int32),
    ((rows,), jnp.float32),
  )
  arrays = [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]

  def run(*args):
    def loss(*args):
      return weighted_nll(*args, implementation=implementation)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)

  with op.target(device.device_kind):
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def assert_no_logits(generation):
  program = compiled(generation)
  assert program.as_text().count("tpu_custom_call") == 2
  # Besides some copies of the rows (32 MiB each): neither logits (4.9 GiB), nor those of a block
  # (0.6 GiB for 1024 rows), nor the matrix's gradient in float32 (1.2 GiB).
  temp = program.memory_analysis().temp_size_in_bytes
  assert temp < 8 * T * D * 2, f"{temp / 2**20:.0f} MiB"
  useful = 3 * 2 * T * D * V  # a fourth product computes logits again
  assert useful < program.cost_analysis()["flops"] < 1.01 * 4 / 3 * useful


@pytest.mark.slow
def test_a_v5p_holds_no_logits():
  assert_no_logits("v5p")


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "v6e", "tpu7x"])
def test_no_tpu_holds_logits(generation):
  assert_no_logits(generation)


@pytest.mark.slow
def test_row_blocks_hold_the_logits_of_a_block():
  """Where the kernels refuse: a few times the block's logits and the float32 gradient."""
  program = compiled("v5p", vocabulary=V - 1)
  assert "tpu_custom_call" not in program.as_text()
  temp = program.memory_analysis().temp_size_in_bytes
  assert temp < 4 * T * V * 4 / 5, f"{temp / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {"width": 4096},  # LLaDA2.0-flash
    {"rows": 100, "width": 96, "vocabulary": 768},
    {"rows": 1000, "vocabulary": 126464},  # LLaDA
    {"rows": 2048, "vocabulary": 384, "dtype": jnp.float32},
  ],
)
@pytest.mark.parametrize("generation", ["v5e", "v5p"])
def test_other_shapes_compile(generation, options):
  assert compiled(generation, **options).as_text().count("tpu_custom_call") == 2
