"""Every TPU kernel, forward and backward, compiled for every generation without having one.

The compiler refuses what does not fit vector memory or the tiles of an array. What it accepts must
do no more than the useful work and need no memory to speak of besides its arguments: products of
groups are easily expanded to all groups.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from kernels_pallas import op
from kernels_pallas.expert_ffn import expert_ffn
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.permute import collect, combine, dispatch

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# LLaDA-MoE's layer for 8192 tokens: 65536 rows, 64 experts of 2048 x 1024, 8 experts per token.
T, K, E, D, F = 8192, 8, 64, 2048, 1024
R = T * K
MIB = 1 << 20
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Case:
  """What is compiled, and what it may cost.

  Attributes:
    function: of the arrays, (derivative argument numbers) are differentiated too.
    arrays: name -> (shape, dtype).
    wrt: arguments whose gradients are computed as well; empty: forward only.
    flops: useful ones, forward and backward.
    temp: bytes besides arguments and results.
  """

  function: callable
  arrays: tuple
  wrt: tuple = ()
  flops: float = 0.0
  temp: int = 2 * MIB


bf16, i32, f32 = jnp.bfloat16, jnp.int32, jnp.float32
ROUTE = ((R,), i32), ((R,), i32)
PRODUCT = 2.0 * R * D * F
CASES = {
  "matmul": Case(grouped_matmul, (((R, F), bf16), ((E, F, D), bf16), ((E,), i32)), flops=PRODUCT),
  "matmul gradients": Case(
    grouped_matmul,
    (((R, F), bf16), ((E, F, D), bf16), ((E,), i32)),
    wrt=(0, 1),
    flops=3 * PRODUCT,
  ),
  "swiglu": Case(
    grouped_swiglu, (((R, D), bf16), ((E, D, 2 * F), bf16), ((E,), i32)), flops=2 * PRODUCT
  ),
  # Gate and up, and their gradients: [R, F] each.
  "swiglu gradients": Case(
    grouped_swiglu,
    (((R, D), bf16), ((E, D, 2 * F), bf16), ((E,), i32)),
    wrt=(0, 1),
    flops=6 * PRODUCT,
    temp=4 * R * F * 2 + 2 * MIB,
  ),
  # The tokens' view by row.
  "dispatch": Case(
    lambda x, order, inverse: dispatch(x, order, inverse, K),
    (((T, D), bf16), *ROUTE),
    temp=T * D * 2 + 2 * MIB,
  ),
  # All rows' view by row, which a grouped matmul before it saves.
  "dispatch gradient": Case(
    lambda x, order, inverse: dispatch(x, order, inverse, K),
    (((T, D), bf16), *ROUTE),
    wrt=(0,),
    temp=R * D * 2 + 2 * T * D * 2 + 2 * MIB,
  ),
  "collect": Case(
    lambda rows, order, inverse: collect(rows, order, inverse, K),
    (((R, D), bf16), *ROUTE),
    temp=R * D * 2 + T * D * 2 + 2 * MIB,
  ),
  "combine gradients": Case(
    combine,
    (((R, D), bf16), ((T, K), f32), *ROUTE),
    wrt=(0, 1),
    temp=R * D * 2 + 2 * T * D * 2 + R * 128 * 4 + 4 * MIB,
  ),
  # Dispatched rows, gate, up, hidden activations, and their gradients: not all at once, but the
  # order is the compiler's (libtpu 0.0.42: 1026 MiB, 0.0.50: 1419 MiB on v5p).
  "expert_ffn gradients": Case(
    expert_ffn,
    (
      ((T, D), bf16),
      ((E, D, 2 * F), bf16),
      ((E, F, D), bf16),
      ((T, K), f32),
      *ROUTE,
      ((E,), i32),
    ),
    wrt=(0, 1, 2, 3),
    flops=9 * PRODUCT,
    temp=R * (2 * D + 7 * F) * 2 + 64 * MIB,
  ),
}


@functools.cache
def compiled(name, generation):
  case = CASES[name]
  device = topologies.get_topology_desc(
    platform="tpu", topology_name=TOPOLOGIES[generation]
  ).devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  arrays = [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in case.arrays]

  def run(*arrays):
    return case.function(*arrays)

  def run_with_gradients(grad, *arrays):
    def partly(*some):
      every = dict(enumerate(arrays)) | dict(zip(case.wrt, some, strict=True))
      return case.function(*every.values())

    out, vjp = jax.vjp(partly, *(arrays[i] for i in case.wrt))
    return out, *vjp(grad)

  with op.target(device.device_kind):
    if case.wrt:
      out = jax.eval_shape(run, *arrays)
      arrays.insert(0, jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding))
      run = run_with_gradients
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def assert_costs_what_it_must(name, generation):
  case, program = CASES[name], compiled(name, generation)
  flops = program.cost_analysis()["flops"]
  temp = program.memory_analysis().temp_size_in_bytes
  assert "tpu_custom_call" in program.as_text()
  assert temp <= case.temp, f"{temp / MIB:.1f} MiB"
  # The rest is elementwise: less than 64 operations per number of a row.
  assert case.flops <= flops <= 1.01 * case.flops + 64 * R * D, f"{flops:.3e}"


# Between them these call every kernel.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_ffn gradients", "combine gradients"])
def test_compiles_for_v5p_and_costs_what_it_must(name):
  assert_costs_what_it_must(name, "v5p")


@pytest.mark.slow
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_every_generation_and_costs_what_it_must(name, generation):
  assert_costs_what_it_must(name, generation)
