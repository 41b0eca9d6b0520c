"""The transformer against NumPy, on drawn models that use every field."""

import dataclasses
import functools
import random

import jax
import numpy as np
import pytest
from folders import GOLDENS, abstract, like, read
from numpy_forward import forward, route

from lladax.models import ModelConfig, Transformer, abstract_params, block_causal, full
from lladax.moe import MoEConfig, SigmoidBias, TopKSoftmax

ROUTERS = (
  TopKSoftmax(),
  TopKSoftmax(norm_topk_prob=True, routed_scaling_factor=2.0),
  TopKSoftmax(expert_bias=True),
  SigmoidBias(n_group=4, topk_group=2, routed_scaling_factor=2.5),
  SigmoidBias(n_group=2, topk_group=1, norm_topk_prob=False),
  SigmoidBias(),
)
SEEDS = range(12)


def draw(seed: int) -> ModelConfig:
  """A model by seed; dense and routed ones and the routers take turns, the rest is chance."""
  chance = random.Random(seed)
  moe = None
  if seed % 4:
    moe = MoEConfig(
      num_experts=8,
      num_experts_per_tok=chance.choice([1, 2, 3]),
      expert_intermediate_size=12,
      shared_expert_intermediate_size=chance.choice([None, 10]),
      router=ROUTERS[seed % len(ROUTERS)],
    )
  return ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=chance.choice([None, 2, 1]),
    head_dim=chance.choice([None, 8]),
    intermediate_size=20,
    moe=moe,
    first_k_dense=chance.choice([0, 1]) if moe else 0,
    rope_theta=chance.choice([100.0, 1e4]),
    partial_rotary_factor=chance.choice([1.0, 0.5]),
    rms_norm_eps=chance.choice([1e-5, 1e-2]),
    qk_norm=chance.choice([True, False]),
    attention_bias=chance.choice([True, False]),
    causal=chance.choice([True, False]),
    shift=chance.choice([True, False]),
    tie_word_embeddings=chance.choice([True, False]),
    mask_token_id=3,
    eos_token_id=1,
    pad_token_id=2,
  )


def random_params(config: ModelConfig, seed: int) -> dict:
  """Large enough that attention and routing are far from even."""
  chance = np.random.default_rng(seed)
  params = {}
  for path, x in abstract(config).items():
    noise = chance.standard_normal(x.shape) * 0.4
    params[path] = (noise + path.endswith("scale")).astype(np.float32)
  return params


@pytest.mark.parametrize("seed", SEEDS)
def test_transformer(seed):
  config = draw(seed)
  params = random_params(config, seed)
  tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 10)).astype(np.int32)
  mask, allowed = full(), None
  if seed % 2:
    blocks = np.arange(10) // 4
    mask, allowed = block_causal(4), blocks[:, None] >= blocks
  run = jax.jit(functools.partial(Transformer(config).apply, mask=mask))
  logits, _ = run({"params": like(abstract_params(config), params)}, tokens)
  expected = forward(config, params, tokens, allowed)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_the_draw_covers_every_field():
  configs = [draw(seed) for seed in SEEDS]
  for field in ("num_key_value_heads", "head_dim", "first_k_dense", "partial_rotary_factor",
                "qk_norm", "attention_bias", "causal", "shift", "tie_word_embeddings"):  # fmt: skip
    assert len({getattr(config, field) for config in configs}) > 1, field
  routed = [config.moe for config in configs if config.moe is not None]
  assert {moe.router for moe in routed} == set(ROUTERS)
  assert {moe.shared_expert_intermediate_size for moe in routed} == {None, 10}
  assert any(moe.num_experts_per_tok > 1 and moe.router.has_bias for moe in routed)


@pytest.mark.parametrize("name", ["logits", "block_causal_logits_bs8"])
def test_reference_agrees_with_torch(name):
  """The reference itself, on LLaDA2's weights: 1e-5 of what torch computes in float32."""
  _, config, _, params, golden = read("llada2_moe")
  blocks = np.arange(golden["tokens"].shape[1]) // 8
  allowed = None if name == "logits" else blocks[:, None] >= blocks
  expected = np.load(GOLDENS / "llada2_moe" / "attended.npz")[name]
  logits = forward(config, params, golden["tokens"], allowed)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_routing_by_hand():
  moe = MoEConfig(
    num_experts=6,
    num_experts_per_tok=2,
    expert_intermediate_size=1,
    router=SigmoidBias(n_group=3, topk_group=1, routed_scaling_factor=2.0),
  )
  scores = np.array([0.9, 0.1, 0.5, 0.6, 0.2, 0.3])
  layer = {"moe/router": np.log(scores / (1 - scores))[None], "moe/expert_bias": np.zeros(6)}
  # Groups weigh 1.0, 1.1 and 0.5: the best expert, 0, is out.
  weights = route(moe, layer, np.ones(1))
  assert weights == pytest.approx({3: 2 * 0.6 / 1.1, 2: 2 * 0.5 / 1.1})
  # A bias moves the choice, not the weights.
  layer["moe/expert_bias"] = np.array([0, 0.2, 0, 0, 0, 0])
  assert route(moe, layer, np.ones(1)) == pytest.approx({0: 1.8, 1: 0.2})
  plain = dataclasses.replace(moe, router=TopKSoftmax())
  total = sum(np.exp(layer["moe/router"][0]))
  expected = {e: np.exp(layer["moe/router"][0, e]) / total for e in (0, 3)}
  assert route(plain, layer, np.ones(1)) == pytest.approx(expected)
