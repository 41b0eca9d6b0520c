"""Attention compiled for TPUs and lowered for NVIDIA GPUs without having either.

What matters is that no [L, L] scores of all heads lie in memory, forward or backward.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from kernels_pallas import op
from kernels_pallas.attention import attention, cudnn

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

B, L, N, H = 2, 4096, 16, 128
SCORES = 4 * B * N * L * L
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
H100 = "NVIDIA H100 80GB HBM3"

# Keyword arguments of `shapes`: lengths, key heads, head size, segments, blocks, dtype.
MASKS = {
  "full": {},
  "packed block-causal": {"packed": True, "block_length": 32},
  "keys of others": {"packed": True, "others": True},
}
ODD = {
  "lengths": {"L": 1000, "S": 4100, "packed": True, "block_length": 32, "traced": True},
  "groups": {"heads": 8, "K": 1, "packed": True},
  "small heads": {"heads": 4, "H": 64},
  "crooked heads": {"heads": 4, "H": 80},
  "large heads": {"heads": 2, "H": 256, "packed": True, "block_length": 1},
  "float32": {"heads": 4, "dtype": jnp.float32, "block_length": 32},
  "long": {"B": 1, "L": 32768, "heads": 2, "packed": True, "block_length": 32},
}


def lowered(
  platform,
  device=None,
  *,
  implementation=None,
  B=B,
  L=L,
  S=None,
  heads=N,
  K=None,
  H=H,
  packed=False,
  others=False,
  block_length=None,
  traced=False,
  dtype=jnp.bfloat16,
):
  """Output and gradients of query, key and value, traced for a target and lowered."""
  S, K = S or L, K or heads
  sharding = device and jax.sharding.SingleDeviceSharding(device)
  array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  query, key = array((B, L, heads, H), dtype), array((B, S, K, H), dtype)
  ids = [array((B, n), jnp.int32) if packed else None for n in (L, S)]
  if S == L and not others:
    ids[1] = None

  def run(query, key, value, grad, ids, offset):
    def attend(*args):
      return attention(
        *args,
        ids[0],
        key_segment_ids=ids[1],
        block_length=block_length,
        query_offset=offset if traced else 0,
        implementation=implementation,
      )

    out, vjp = jax.vjp(attend, query, key, value)
    return out, *vjp(grad)

  with op.target(device.device_kind if device else H100):
    traced_run = jax.jit(run).trace(query, key, key, query, ids, array((), jnp.int32))
    return traced_run.lower(lowering_platforms=(platform,))


def temporary_bytes(generation, **options):
  topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
  compiled = lowered("tpu", topology.devices[0], **options).compile()
  kernels = compiled.as_text().count("tpu_custom_call")
  return compiled.memory_analysis().temp_size_in_bytes, kernels


def assert_no_scores(generation, mask):
  temp, kernels = temporary_bytes(generation, **MASKS[mask])
  assert kernels == 3  # forward; gradients of queries; gradients of keys and values
  assert temp < SCORES / 6, f"{temp / 2**20:.0f} MiB"


@pytest.mark.slow
def test_a_v5e_holds_no_scores():
  assert_no_scores("v5e", "packed block-causal")


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_no_tpu_holds_scores(generation, mask):
  assert_no_scores(generation, mask)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("generation", ["v5e", "v5p"])
def test_odd_shapes_compile(generation, shape):
  assert temporary_bytes(generation, **ODD[shape])[1] == 3


@pytest.mark.slow
def test_chunks_hold_no_scores_either_and_the_reference_does():
  assert temporary_bytes("v5e", implementation="chunked")[0] < SCORES / 6
  assert temporary_bytes("v5e", implementation="reference")[0] >= SCORES / 2  # bfloat16


@pytest.fixture
def a_version_of_cudnn(monkeypatch):
  """JAX asks for cuDNN while it traces; a number will do to lower."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  cudnn._missing.cache_clear()
  yield
  cudnn._missing.cache_clear()


@pytest.mark.parametrize(
  "options, kernel",
  [
    ({}, "fmhaSoftmax"),
    ({"block_length": 1, "K": 4}, "fmhaSoftmax"),
    ({"packed": True}, "fmhaScaleBiasSoftmax"),
    ({"block_length": 32, "S": 6000}, "fmhaScaleBiasSoftmax"),
  ],
)
def test_an_h100_is_given_cudnn(a_version_of_cudnn, options, kernel):
  text = lowered("cuda", **options).as_text()
  # Once more forward, in the backward pass.
  assert re.findall(r"__cudnn\$(\w+)", text) == [kernel, kernel, f"{kernel}Backward"]


@pytest.mark.parametrize("options", [{"dtype": jnp.float32}, {"L": 16384, "packed": True}])
def test_an_h100_is_given_chunks_where_cudnn_refuses(a_version_of_cudnn, options):
  text = lowered("cuda", **options).as_text()
  assert "__cudnn" not in text
  assert text.count("stablehlo.while") == 2  # forward and backward, each a loop over chunks
