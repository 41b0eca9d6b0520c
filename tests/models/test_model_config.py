"""Parameter counts by closed form, the published counts, and every error of the config."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from lladax.models import (
  PROXIES,
  ModelConfig,
  abstract_params,
  count_parameters,
  dream_7b,
  llada2_flash,
  llada2_mini,
  llada_8b,
  llada_moe_7b_a1b,
  proxy,
  proxy_25m,
  qwen2_5,
  tiny,
)
from lladax.moe import MoEConfig, SigmoidBias


def closed_form(config: ModelConfig) -> dict[str, int]:
  """The counts written out from the shapes of the architecture."""
  D, V, n = config.hidden_size, config.vocab_size, config.num_hidden_layers
  N = config.num_attention_heads
  K = config.num_key_value_heads or N
  H = config.head_dim or D // N
  attention = 2 * D * N * H + 2 * D * K * H
  attention += (N + 2 * K) * H if config.attention_bias else 0
  attention += 2 * H if config.qk_norm else 0
  block = attention + 2 * D  # two norms
  dense_layers = n if config.moe is None else config.first_k_dense
  total = n * block + D
  active = total
  if dense_layers:
    ffn = dense_layers * 3 * D * config.intermediate_size
    total, active = total + ffn, active + ffn
  if config.moe is not None:
    expert = 3 * D * config.moe.expert_intermediate_size
    bias = config.moe.num_experts if config.moe.router.has_bias else 0
    each = (
      bias + D * config.moe.num_experts + 3 * D * (config.moe.shared_expert_intermediate_size or 0)
    )
    total += (n - dense_layers) * (each + config.moe.num_experts * expert)
    active += (n - dense_layers) * (each + config.moe.num_experts_per_tok * expert)
  embedding = V * D if config.tie_word_embeddings else 2 * V * D
  return {
    "total": total + embedding,
    "embedding": embedding,
    "active": active + V * D,
    "active_non_embedding": active,
  }


@st.composite
def configs(draw):
  heads = draw(st.sampled_from([1, 2, 4]))
  layers = draw(st.integers(1, 3))
  experts = draw(st.integers(1, 5))
  moe = MoEConfig(
    num_experts=experts,
    num_experts_per_tok=draw(st.integers(1, experts)),
    expert_intermediate_size=draw(st.integers(1, 9)),
    shared_expert_intermediate_size=draw(st.none() | st.integers(1, 9)),
    router=draw(st.sampled_from([MoEConfig.router, SigmoidBias()])),
  )
  return ModelConfig(
    vocab_size=draw(st.integers(2, 50)),
    hidden_size=8 * draw(st.integers(1, 3)),
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=draw(st.none() | st.sampled_from([k for k in (1, 2, 4) if k <= heads])),
    head_dim=draw(st.none() | st.sampled_from([2, 6])),
    intermediate_size=draw(st.integers(1, 9)),
    moe=draw(st.sampled_from([None, moe, moe])),
    first_k_dense=draw(st.integers(0, layers)),
    qk_norm=draw(st.booleans()),
    attention_bias=draw(st.booleans()),
    tie_word_embeddings=draw(st.booleans()),
    mask_token_id=1,
    eos_token_id=0,
    pad_token_id=0,
  )


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(config=configs())
def test_counts_equal_the_closed_form(config):
  assert dataclasses.asdict(count_parameters(config)) == closed_form(config)


def test_llada_moe_7b_a1b_counts_as_published():
  counts = count_parameters(llada_moe_7b_a1b())
  assert counts.total == 7_356_880_896
  assert counts.active == 1_397_823_488
  assert counts.active_non_embedding == 1_075_910_656
  assert counts.total - counts.embedding == 6_713_055_232
  assert dataclasses.asdict(counts) == closed_form(llada_moe_7b_a1b())


def test_llada_8b_counts_as_published():
  counts = count_parameters(llada_8b())
  assert counts.total == 8_015_581_184  # "8.02B", 6.98B of them outside the embeddings
  assert counts.active_non_embedding == 6_979_588_096
  assert dataclasses.asdict(counts) == closed_form(llada_8b())


@pytest.mark.parametrize(
  ("config", "total"),
  [
    # The totals that the model cards of Qwen2.5 give; Dream-7B has the shapes of Qwen2.5-7B.
    (qwen2_5("0.5b"), 494_032_768),
    (qwen2_5("1.5b"), 1_543_714_304),
    (qwen2_5("3b"), 3_085_938_688),
    (qwen2_5("7b"), 7_615_616_512),
    (dream_7b(), 7_615_616_512),
    # "16B" and "103B": exact numbers were not published; the closed form confirms ours.
    (llada2_mini(), 16_255_643_392),
    (llada2_flash(), 102_889_705_216),
  ],
  ids=["qwen 0.5b", "qwen 1.5b", "qwen 3b", "qwen 7b", "dream", "llada2 mini", "llada2 flash"],
)
def test_relatives_count_as_published(config, total):
  counts = count_parameters(config)
  assert counts.total == total
  assert dataclasses.asdict(counts) == closed_form(config)


def test_llada2_is_active_as_published():
  # "1.4B" and "6.1B" count both embeddings.
  for config, billions in ((llada2_mini(), 1.4), (llada2_flash(), 6.1)):
    counts = count_parameters(config)
    both = counts.active + config.vocab_size * config.hidden_size
    assert abs(both / 1e9 - billions) < 0.06


def test_only_a_causal_model_can_be_without_a_mask_token():
  assert dataclasses.replace(tiny(), mask_token_id=None, causal=True).mask_token_id is None
  with pytest.raises(ValueError, match="mask_token_id: .* causal"):
    dataclasses.replace(tiny(), mask_token_id=None)


def test_the_proxies_form_a_ladder():
  rungs = [proxy(name) for name in PROXIES]
  totals = [count_parameters(config).total for config in rungs]
  for name, config, total in zip(PROXIES, rungs, totals, strict=True):
    millions = int(name.removeprefix("proxy_").removesuffix("m"))
    assert 0.5 < total / 1e6 / millions < 2  # the name is an order of magnitude
    assert config.moe.num_experts == 8 * config.moe.num_experts_per_tok
  assert totals == sorted(totals)
  assert round(count_parameters(proxy_25m()).total / 1e6, 1) == 24.7
  with pytest.raises(ValueError, match="'proxy_1m'.*proxy_3m"):
    proxy("proxy_1m")


def test_parameters_have_the_dtype_asked_for():
  params = abstract_params(tiny(param_dtype="bfloat16"))
  paths = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype.name
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  float32 = {path for path, dtype in paths.items() if dtype == "float32"}
  # Norms and the router stay in float32.
  assert float32 == {path for path in paths if path.endswith(("scale", "router"))}
  assert set(paths.values()) == {"float32", "bfloat16"}


ERRORS = [
  (dict(vocab_size=0), "vocab_size", 0),
  (dict(hidden_size=-8), "hidden_size", -8),
  (dict(num_hidden_layers=0), "num_hidden_layers", 0),
  (dict(num_attention_heads=0), "num_attention_heads", 0),
  (dict(max_position_embeddings=0), "max_position_embeddings", 0),
  (dict(scan_unroll=0), "scan_unroll", 0),
  (dict(num_key_value_heads=0), "num_key_value_heads", 0),
  (dict(num_key_value_heads=3), "num_key_value_heads", 3),
  (dict(num_attention_heads=3), "hidden_size", 256),  # 256 is not a multiple of 3
  (dict(head_dim=0), "head_dim", 0),
  (dict(head_dim=7), "head_dim", 7),
  (dict(partial_rotary_factor=0.0), "partial_rotary_factor", 0.0),
  (dict(partial_rotary_factor=1.5), "partial_rotary_factor", 1.5),
  (dict(partial_rotary_factor=0.01), "partial_rotary_factor", 0.01),  # less than one pair
  (dict(partial_rotary_factor=5 / 64), "partial_rotary_factor", 5 / 64),  # an odd number
  (dict(first_k_dense=5), "first_k_dense", 5),
  (dict(first_k_dense=-1), "first_k_dense", -1),
  (dict(first_k_dense=1), "intermediate_size", None),
  (dict(moe=None), "intermediate_size", None),
  (dict(moe=None, intermediate_size=0), "intermediate_size", 0),
  (dict(dtype="float16"), "dtype", "float16"),
  (dict(param_dtype="float64"), "param_dtype", "float64"),
  (dict(remat="all"), "remat", "all"),
  (dict(mask_token_id=2048), "mask_token_id", 2048),
  (dict(eos_token_id=-1), "eos_token_id", -1),
  (dict(pad_token_id=9999), "pad_token_id", 9999),
  (dict(mask_token_id=0), "mask_token_id", 0),  # the id of eos
]


@pytest.mark.parametrize("changes, field, value", ERRORS, ids=lambda x: str(x))
def test_errors_name_field_and_value(changes, field, value):
  with pytest.raises(ValueError) as error:
    tiny(**changes)
  assert f"ModelConfig.{field}:" in str(error.value)
  assert repr(value) in str(error.value)
