"""The published implementations' own logits and decodings, from their weights.

`tests/goldens/README.md` says what is in the files. The names are read by `lladax.hub`.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import GOLDENS, NAMES, abstract, like, read

from lladax.infer import LowConfidence, SamplerConfig, generate
from lladax.models import Denoiser, Transformer, abstract_params, block_causal, full
from lladax.moe import layer as moe_layer
from lladax.moe import router_stats

DECODED = ("lladamoe_tiny", "llada_dense")


def tree(config, params):
  return like(abstract_params(config), params)


def logits_of(config, params, tokens, mask=None):
  run = jax.jit(functools.partial(Transformer(config).apply, mask=mask))
  return np.asarray(run({"params": tree(config, params)}, tokens)[0])


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
  assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llada2_moe"])
def test_logits(name):
  _, config, _, params, golden = read(name)
  expected = golden["logits"]
  assert config.shift == (name in ("dream", "qwen2_ar"))
  if config.shift:
    # theirs at i predict token i + 1
    expected = np.concatenate([expected[:, :1], expected[:, :-1]], axis=1)
  assert_close(logits_of(config, params, golden["tokens"]), expected)


@pytest.mark.parametrize("name", ["logits", "block_causal_logits_bs8"])
def test_llada2_under_both_masks(name):
  _, config, _, params, golden = read("llada2_moe")
  attended = np.load(GOLDENS / "llada2_moe" / "attended.npz")
  mask = full() if name == "logits" else block_causal(8)
  assert_close(logits_of(config, params, golden["tokens"], mask), attended[name])


def test_llada2_golden_with_equal_scores():
  """Its `golden.npz` was made with all attention scores equal: see the README there.

  With queries of zero ours are equal, too, and all the rest is compared: values, router with
  groups and bias, shared expert, dense first layer.
  """
  _, config, _, params, golden = read("llada2_moe")
  np.testing.assert_array_equal(golden["logits"], golden["block_causal_logits_bs8"])
  masked = golden["logits"][0][golden["tokens"][0] == config.mask_token_id]
  assert len(masked) > 1 and np.ptp(masked, axis=0).max() < 1e-5  # no position is told apart
  silent = {
    path: np.zeros_like(x) if path.endswith("query_norm/scale") else x for path, x in params.items()
  }
  assert_close(logits_of(config, silent, golden["tokens"]), golden["logits"])


def run_and_watch(config, params, tokens, monkeypatch):
  """Logits, and bool[n, T, E]: the experts that each routed layer chooses for each token."""

  def choices(logits, routing, valid=None, **on_mesh):
    chosen = (routing.experts[..., None] == jnp.arange(logits.shape[-1])).any(1)
    return router_stats(logits, routing, valid, **on_mesh).replace(load=chosen)

  with monkeypatch.context() as patch:
    patch.setattr(moe_layer, "router_stats", choices)
    run = jax.jit(Transformer(config).apply)
    logits, stats = run({"params": tree(config, params)}, tokens)
  return np.asarray(logits), np.asarray(stats.load)


def test_bfloat16_flips_few_choices(monkeypatch):
  _, config, _, params, golden = read("lladamoe_tiny")
  _, rounded_config, _, rounded, _ = read("lladamoe_tiny", "bfloat16")
  assert rounded_config == dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
  tokens, k = golden["tokens"], config.moe.num_experts_per_tok
  _, exact = run_and_watch(config, params, tokens, monkeypatch)
  logits, choices = run_and_watch(rounded_config, rounded, tokens, monkeypatch)
  assert exact.sum() == choices.sum() == tokens.size * k * config.num_hidden_layers
  flipped = exact & ~choices
  error = np.abs(logits - golden["logits"])
  print(
    f"bfloat16: {flipped.sum()} of {exact.sum()} choices of experts flipped, by layer "
    f"{flipped.sum((1, 2)).tolist()}; logits off by {error.mean():.4f} on average, {error.max():.3f}"
    " at most"
  )
  assert flipped.sum() <= 0.05 * exact.sum()
  # Another expert moves the logits of its token more than rounding does.
  steady = ~flipped.any((0, 2)).reshape(tokens.shape)
  assert error[steady].max() < 0.25


def test_bfloat16_keeps_norms_and_router_in_float32():
  _, config, tensors, params, _ = read("lladamoe_tiny", "bfloat16")
  dtypes = {path: x.dtype.name for path, x in params.items()}
  assert dtypes == {path: x.dtype.name for path, x in abstract(config).items()}
  assert {path for path, dtype in dtypes.items() if dtype == "float32"} == {
    path for path in params if path.endswith(("scale", "moe/router"))
  }
  np.testing.assert_array_equal(params["final_norm/scale"], tensors["model.norm.weight"])


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", DECODED)
def test_decoding(name, index):
  _, config, _, params, golden = read(name)
  prompts = golden[f"gen{index}_prompt"]
  sampler = SamplerConfig(unmask=LowConfidence(), **json.loads(str(golden[f"gen{index}_args"])))
  result = generate(
    Denoiser(config),
    tree(config, params),
    prompts.tolist(),
    sampler,
    mask_id=config.mask_token_id,
    eos_id=config.eos_token_id,
    pad_id=config.pad_token_id,
    prompt_multiple=16 if index == 1 else 1,  # once with padding before the prompts
  )
  rows = [result.row(r) for r in range(len(prompts))]
  np.testing.assert_array_equal(rows, golden[f"gen{index}_out"])
  passes = sampler.steps * (2 if sampler.cfg_scale else 1)
  np.testing.assert_array_equal(result.nfe, passes)
