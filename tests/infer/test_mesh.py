"""Decoding on a mesh gives the tokens of one device, cache included."""

import dataclasses
import functools

import flax.linen as nn
import jax
import pytest
from test_caching import BASE, CONFIG, run

from lladax.infer import BlockCausal, DualCache, SamplerConfig, Smoothing, Threshold, Vicinity
from lladax.models import Denoiser, for_inference, init_variables
from lladax.moe import MoEConfig
from lladax.sharding import MeshConfig, make_mesh, param_shardings, use_mesh

MODEL = dataclasses.replace(
  CONFIG,
  num_attention_heads=4,
  moe=MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=16),
)
MESHES = [
  MeshConfig(data=1, expert=4, tensor=2),
  pytest.param(MeshConfig(data=2, fsdp=2, expert=2), marks=pytest.mark.slow),
]
SAMPLER = dataclasses.replace(BASE, cache=DualCache(), unmask=Threshold(0.3))


def on_one_device(config: SamplerConfig, network: Denoiser):
  params = jax.jit(_params)()
  return params, run(config, network=network, params=params)


def _params():
  return nn.meta.unbox(init_variables(MODEL, jax.random.key(1))["params"])


CACHES = (DualCache(), Vicinity(before=3, after=2, warmup=1), BlockCausal())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
  "cache",
  [CACHES[0], *(pytest.param(cache, marks=pytest.mark.slow) for cache in CACHES[1:])],
  ids=lambda cache: type(cache).__name__,
)
def test_tokens_are_those_of_one_device(mesh, cache):
  ready, causal = cache != CACHES[1], cache == CACHES[2]
  smoothing = None if ready else Smoothing()
  config = dataclasses.replace(SAMPLER, cache=cache, align_blocks=causal, smoothing=smoothing)
  denoiser = functools.partial(Denoiser, block_length=config.block_length if causal else None)
  params, want = on_one_device(config, denoiser(MODEL))
  with use_mesh(make_mesh(mesh)) as in_use:
    boxed = jax.eval_shape(lambda: init_variables(MODEL, jax.random.key(0))["params"])
    params = jax.device_put(params, param_shardings(in_use, boxed))
    model = MODEL
    if ready:
      model, params = for_inference(MODEL, params)
    got = run(config, network=denoiser(model), params=params)
  assert [got.row(r) for r in range(3)] == [want.row(r) for r in range(3)]
  assert got.nfe.tolist() == want.nfe.tolist()


def test_memory_lies_where_it_is_used():
  with use_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
    for leaf in jax.tree.leaves(Denoiser(MODEL).empty_memory(2, 16)):
      shape = (MODEL.num_hidden_layers, 2, 16, MODEL.kv_heads, MODEL.head_size)
      assert leaf.shape == shape and leaf.dtype == MODEL.dtype
      assert leaf.sharding.shard_shape(shape) == (shape[0], 1, 16, shape[3] // 4, shape[4])


def test_a_split_sequence_is_refused():
  params = jax.jit(_params)()
  with use_mesh(make_mesh(MeshConfig(data=4, context=2))):
    with pytest.raises(ValueError, match="decode on a mesh with context=1"):
      run(SAMPLER, network=Denoiser(MODEL), params=params)
