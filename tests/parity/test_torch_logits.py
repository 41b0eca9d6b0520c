"""Logits equal those of torch models on random configs, and folders go both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_models import RELATIVES, VOCABULARY, load, random_params, torch_logits
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from lladax.hub.export import save_folder
from lladax.hub.load import load_folder
from lladax.models import Transformer
from lladax.models.attention import segments
from lladax.moe import SigmoidBias


def draw_rows(seed):
  """tokens, positions, segment_ids int32[2, 24]: packed documents, each with its own positions."""
  random = np.random.default_rng(seed)
  tokens = random.integers(0, VOCABULARY, (2, 24), dtype=np.int32)
  starts = random.random((2, 24)) < 0.15
  starts[:, 0] = True
  segment_ids = starts.cumsum(1, dtype=np.int32)
  index = np.arange(24, dtype=np.int32) * np.ones((2, 1), np.int32)
  positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  return tokens, positions, segment_ids


def our_logits(config, params, tokens, positions, segment_ids):
  apply = jax.jit(
    lambda *rows: Transformer(config).apply(
      {"params": params}, rows[0], positions=rows[1], mask=segments(rows[2])
    )[0]
  )
  return np.asarray(apply(*map(jnp.asarray, (tokens, positions, segment_ids))))


def assert_same(ours, theirs):
  """Within 1e-5 of the largest logit; and they are worth comparing."""
  scale = np.abs(theirs).max()
  assert scale > 0.5 and theirs.std() > 0.1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize(
  "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (3, 4))]
)
@pytest.mark.parametrize("name", RELATIVES)
def test_logits(tmp_path, name, seed):
  relative = RELATIVES[name]
  config = relative.config(seed)
  params = random_params(config, seed)
  relative.write(tmp_path, config, params)
  rows = draw_rows(seed)
  model = load(tmp_path, relative.model)
  assert_same(our_logits(config, params, *rows), torch_logits(model, config, *rows))


@pytest.mark.parametrize("seed", range(2))
def test_our_model_exported_loads_into_torch(tmp_path, seed):
  """What a person does: save, then from_pretrained, nothing in between."""
  config = RELATIVES["qwen2"].config(seed)
  config = dataclasses.replace(config, causal=True, shift=True)
  params = random_params(config, seed)
  save_folder(tmp_path / "model", config=config, params=params)
  model = load(tmp_path / "model", "AutoModelForCausalLM")
  assert isinstance(model, transformers.Qwen2ForCausalLM)
  rows = draw_rows(seed)
  assert_same(our_logits(config, params, *rows), torch_logits(model, config, *rows))
  # Without masks and positions, as anyone calls it: one document.
  tokens = rows[0]
  with torch.no_grad():
    plain = model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
  ours = our_logits(
    config, params, tokens, np.arange(24) * np.ones((2, 1), int), np.ones_like(tokens)
  )
  assert_same(ours[:, 1:], plain[:, :-1])


def test_our_mixture_exported_loads_into_torch(tmp_path):
  """LLaDA-MoE's folder is Qwen3-MoE's but for config.json: the tensors have the same names."""
  relative = RELATIVES["qwen3_moe"]
  config = dataclasses.replace(
    relative.config(0),
    head_dim=None,
    causal=False,
    shift=False,
    first_k_dense=0,
    intermediate_size=None,
    tie_word_embeddings=False,
  )
  params = random_params(config, 0)
  save_folder(tmp_path / "model", config=config, params=params, max_shard_size=20_000)
  assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
  relative.torch_config(config).save_pretrained(tmp_path / "model")
  rows = draw_rows(0)
  model = load(tmp_path / "model", relative.model)
  assert_same(our_logits(config, params, *rows), torch_logits(model, config, *rows))


@pytest.mark.parametrize(
  "experts, k, fields",
  [
    (256, 8, {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}),  # LLaDA2.0
    (64, 6, {}),
    (16, 4, {"n_group": 4, "topk_group": 1, "norm_topk_prob": False}),
  ],
)
def test_the_sigmoid_router_is_that_of_deepseek_v3(experts, k, fields):
  """At the published sizes, token by token, with a bias that decides."""
  router = SigmoidBias(**fields)
  theirs = DeepseekV3TopkRouter(
    transformers.DeepseekV3Config(
      hidden_size=experts,
      n_routed_experts=experts,
      num_experts_per_tok=k,
      **dataclasses.asdict(router),
    )
  )
  random = np.random.default_rng(0)
  logits = random.normal(size=(512, experts)).astype(np.float32)
  bias = random.normal(size=experts, scale=0.3).astype(np.float32)
  with torch.no_grad():
    theirs.weight.copy_(torch.eye(experts))  # so that its input is the router's logits
    theirs.e_score_correction_bias.copy_(torch.from_numpy(bias))
    _, their_weights, their_experts = (x.numpy() for x in theirs(torch.from_numpy(logits)))
  ours = router(jnp.asarray(logits), k, jnp.asarray(bias))

  def spread(weights, chosen):
    full = np.zeros_like(logits)
    np.put_along_axis(full, np.asarray(chosen), np.asarray(weights), axis=1)
    return full

  expected = spread(their_weights, their_experts)
  np.testing.assert_allclose(spread(ours.weights, ours.experts), expected, rtol=1e-5, atol=1e-7)
  unbiased = router(jnp.asarray(logits), k, jnp.zeros(experts))
  assert (spread(unbiased.weights, unbiased.experts) != expected).any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_written_by_torch_loads(tmp_path, tied, dtype):
  """With shards and an index as `save_pretrained` makes them."""
  torch.manual_seed(0)
  theirs = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
      initializer_range=0.2, eos_token_id=0, pad_token_id=0,
    )
  ).to(getattr(torch, dtype))  # fmt: skip
  theirs.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 1
  loaded = load_folder(tmp_path, dtype="float32", progress=False)
  assert loaded.config.causal and loaded.config.tie_word_embeddings == tied
  model = load(tmp_path, "Qwen2ForCausalLM")
  rows = draw_rows(0)
  ours = our_logits(loaded.config, loaded.params, *rows)
  assert_same(ours, torch_logits(model, loaded.config, *rows))
  # And back, as it was.
  save_folder(
    tmp_path / "back", config=loaded.config, params=loaded.params, source=loaded.source
  )  # fmt: skip
  for file in tmp_path.glob("*.safetensors"):
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
