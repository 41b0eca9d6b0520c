"""A model as it decodes: layers apart, experts in eight bits, on one device and on eight."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lladax
from experiments.quantize_weights import ALL, effects, table
from kernels_pallas.fused_moe import QuantizedExperts
from lladax.hub.load import shardings_of, tree_of
from lladax.infer import SamplerConfig, generate
from lladax.models import (
  Denoiser,
  Memory,
  ModelConfig,
  for_inference,
  init_params,
  quantize_params,
  tiny,
)
from lladax.moe import MoEConfig, Ring
from lladax.sharding import MeshConfig, make_mesh, use_mesh

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
MOE = MoEConfig(num_experts=8, num_experts_per_tok=2, expert_intermediate_size=16)
CONFIG = tiny(
  vocab_size=64,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  moe=MOE,
  initializer_range=0.2,
)
# As LLaDA2: a dense layer first, a shared expert.
MIXED = dataclasses.replace(
  CONFIG,
  num_hidden_layers=3,
  first_k_dense=1,
  intermediate_size=24,
  moe=dataclasses.replace(MOE, shared_expert_intermediate_size=12),
)
PROMPTS = [[5, 9, 11], [7, 8, 30, 31, 12, 40]]


@functools.cache
def params_of(config: ModelConfig):
  return jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return Denoiser(config)(params, tokens, positions, jnp.ones_like(tokens))


TOKENS = np.random.default_rng(0).integers(2, 64, (2, 9)).astype(np.int32)


def test_the_model_for_inference_is_the_same_model():
  changed, params = for_inference(MIXED, params_of(MIXED))
  assert changed.moe.implementation == "inference" and not changed.stacked
  want = logits(MIXED, params_of(MIXED), TOKENS)
  np.testing.assert_allclose(logits(changed, params, TOKENS), want, rtol=0, atol=1e-5)
  assert np.abs(want).max() > 0.5


def test_weights_are_converted_once_and_the_router_never():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  changed, params = for_inference(config, params_of(CONFIG))
  layer = params["layers"]["layer_1"]
  assert layer["moe"]["gate_up"].dtype == jnp.bfloat16 == params["lm_head"]["kernel"].dtype
  assert layer["moe"]["router"].dtype == jnp.float32 == layer["ffn_norm"]["scale"].dtype


@pytest.mark.slow
def test_keys_and_values_of_layers_apart_are_those_of_the_stack():
  changed, unstacked = for_inference(MIXED, params_of(MIXED))
  positions, ones = jnp.arange(9)[None].repeat(2, 0), jnp.ones((2, 9), jnp.int32)
  at = jnp.array([2, 4])

  @functools.partial(jax.jit, static_argnums=0)
  def both(config, params):
    network = Denoiser(config)
    args = params, jnp.asarray(TOKENS), positions, ones
    _, memory = network.read(*args, at=at, width=3, keep=True)
    window = network.read_window(*args, at=at, width=3, memory=memory, start=at, size=4)
    return *window, memory

  (logits, *got), (want_logits, *want) = both(changed, unstacked), both(MIXED, params_of(MIXED))
  got = [
    Memory(*(jax.tree.map(lambda *each: jnp.stack(each), *layers) for layers in pair))
    for pair in ((memory.dense_layers, memory.layers) for memory in got)
  ]
  got, want = (logits, *got), (want_logits, *want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


@pytest.mark.parametrize("dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_only_experts_become_eight_bits_and_the_model_is_that_of_their_values(dtype):
  params = quantize_params(params_of(MIXED), MIXED, dtype)
  moe = params["layers"]["moe"]
  assert isinstance(moe["gate_up"], QuantizedExperts) and moe["gate_up"].dtype.itemsize == 1
  rest, before = dict(params["layers"]), dict(params_of(MIXED)["layers"])
  assert rest.pop("moe")["router"] is before.pop("moe")["router"]
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, rest, before))

  stands_for = jax.tree.map(
    lambda leaf: (
      jax.vmap(lambda e: e.dequantize())(leaf) if isinstance(leaf, QuantizedExperts) else leaf
    ),
    params,
    is_leaf=lambda leaf: isinstance(leaf, QuantizedExperts),
  )
  want = logits(MIXED, stands_for, TOKENS)
  np.testing.assert_allclose(logits(MIXED, params, TOKENS), want, rtol=0, atol=1e-5)
  changed, unstacked = for_inference(MIXED, params_of(MIXED), weights=dtype)
  np.testing.assert_allclose(logits(changed, unstacked, TOKENS), want, rtol=0, atol=1e-5)


def test_what_cannot_be_quantised():
  with pytest.raises(ValueError, match="one of int8, fp8; got 'int4'"):
    quantize_params(params_of(CONFIG), CONFIG, "int4")
  dense = dataclasses.replace(CONFIG, moe=None, intermediate_size=8)
  with pytest.raises(ValueError, match="this model is dense"):
    for_inference(dense, params_of(dense), weights="int8")


# Relative error of the logits and the share of flipped tokens: measured, and half as much again.
# With wrong scales both are tens of percent.
BOUNDS = {
  "lladamoe_tiny": {"int8": (0.02, 0.02), "fp8": (0.055, 0.045), "bfloat16": (0.06, 0.04)},
  "llada2_moe": {"int8": (0.006, 0.012), "fp8": (0.03, 0.027), "bfloat16": (0.067, 0.035)},
}


@pytest.mark.parametrize(
  "name, weights",
  [
    ("lladamoe_tiny", ("int8", "fp8")),
    pytest.param("lladamoe_tiny", ("bfloat16",), marks=pytest.mark.slow),
    pytest.param("llada2_moe", ALL, marks=pytest.mark.slow),
  ],
)
def test_the_effect_of_eight_bits_is_bounded(name, weights):
  ids = {"mask_token_id": 125, "eos_token_id": 124, "pad_token_id": 124}
  model = lladax.load(GOLDENS / name, ids=ids, progress=False)
  tokens = np.random.default_rng(0).integers(0, 124, (64, 24)).astype(np.int32)
  found = effects(model.config, model.params, tokens, weights=weights)
  print(f"\n{name}\n{table(found)}")
  for weights, effect in found.items():
    error, flips = BOUNDS[name][weights]
    assert 0 < effect.error < error
    assert effect.flips < flips


def answers(config, params, prompts=PROMPTS):
  sampler = SamplerConfig(gen_length=8, steps=4, block_length=4)
  result = generate(
    Denoiser(config), params, prompts, sampler, mask_id=1, eos_id=0, pad_id=0, seeds=0
  )
  return [result.row(r) for r in range(len(prompts))]


EIGHT = MeshConfig(expert=2, tensor=2, fsdp=2)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8", "fp8"])
@pytest.mark.parametrize(
  "mesh_config", [EIGHT, MeshConfig(expert=8), MeshConfig(tensor=4, data=2)], ids=str
)
def test_a_mesh_writes_the_tokens_of_one_device(mesh_config, weights):
  want = answers(*for_inference(CONFIG, params_of(CONFIG), weights=weights))
  with use_mesh(make_mesh(mesh_config)) as mesh:
    placed = jax.device_put(params_of(CONFIG), tree_of(CONFIG, shardings_of(CONFIG, mesh)))
    config, params = for_inference(CONFIG, placed, weights=weights)
    assert config.moe.exchange == Ring()
    down = params["layers"]["layer_0"]["moe"]["down"]
    values = down if weights is None else down.values
    devices = mesh.shape["expert"] * mesh.shape["tensor"]
    assert values.sharding.shard_shape(values.shape)[0] == 8 // devices
    assert answers(config, params) == want
