"""The published implementations' own logits and decodings, from their weights.

`tests/goldens/README.md` says what is in the files. The mapping from their names is written out
here, for the two layouts that are tested.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from lladax.infer import LowConfidence, SamplerConfig, generate
from lladax.models import Denoiser, ModelConfig, Transformer, abstract_params
from lladax.moe import MoEConfig

safetensors = pytest.importorskip("safetensors.numpy")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
IDS = {"mask_token_id": 125, "eos_token_id": 124, "pad_token_id": 124}


def lladamoe_config(c: dict) -> ModelConfig:
  return ModelConfig(
    vocab_size=c["vocab_size"],
    hidden_size=c["hidden_size"],
    num_hidden_layers=c["num_hidden_layers"],
    num_attention_heads=c["num_attention_heads"],
    num_key_value_heads=c["num_key_value_heads"],
    moe=MoEConfig(
      num_experts=c["num_experts"],
      num_experts_per_tok=c["num_experts_per_tok"],
      expert_intermediate_size=c["expert_intermediate_size"],
    ),
    max_position_embeddings=c["max_position_embeddings"],
    rope_theta=c["rope_theta"],
    rms_norm_eps=c["rms_norm_eps"],
    qk_norm=c["qk_layernorm"],
    tie_word_embeddings=c["tie_word_embeddings"],
    **IDS,
  )


def llada_config(c: dict) -> ModelConfig:
  return ModelConfig(
    vocab_size=c["embedding_size"],
    hidden_size=c["d_model"],
    num_hidden_layers=c["n_layers"],
    num_attention_heads=c["n_heads"],
    num_key_value_heads=c["n_kv_heads"],
    intermediate_size=c["mlp_hidden_size"],
    max_position_embeddings=c["max_sequence_length"],
    rope_theta=c["rope_theta"],
    rms_norm_eps=c["rms_norm_eps"],
    qk_norm=False,
    tie_word_embeddings=c["weight_tying"],
    **IDS,
  )


class Tensors(dict):
  """Tensors by name; each may be taken once, so that what is left was not mapped."""

  def stack(self, config, name, *heads):
    """Of every layer: [n, out, in] -> [n, in, out], the axes of heads split as `heads` says."""
    layers = np.stack([self.pop(name.format(i)) for i in range(config.num_hidden_layers)])
    layers = np.swapaxes(layers, 1, -1)
    return layers.reshape(len(layers), *heads) if heads else layers

  def attention(self, config, prefix, query="q_proj", out="o_proj"):
    D, N, K, H = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size
    names = {"query": (query, N), "key": ("k_proj", K), "value": ("v_proj", K)}
    params = {
      ours: {"kernel": self.stack(config, f"{prefix}{theirs}.weight", D, heads, H)}
      for ours, (theirs, heads) in names.items()
    }
    return params | {"out": {"kernel": self.stack(config, f"{prefix}{out}.weight", N, H, D)}}

  def norm(self, config, name):
    return {"scale": self.stack(config, name + ".weight")}


def lladamoe_params(config: ModelConfig, t: Tensors) -> dict:
  layer, E = "model.layers.{}.", config.moe.num_experts
  expert = layer + "mlp.experts.%d.%s_proj.weight"
  gate_up, down = [], []
  for e in range(E):
    both = [t.stack(config, expert % (e, name)) for name in ("gate", "up")]
    gate_up.append(np.concatenate(both, axis=-1))
    down.append(t.stack(config, expert % (e, "down")))
  attention = t.attention(config, layer + "self_attn.")
  for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
    attention[ours] = t.norm(config, layer + "self_attn." + theirs)
  return {
    "embed": {"embedding": t.pop("model.embed_tokens.weight")},
    "layers": {
      "attention_norm": t.norm(config, layer + "input_layernorm"),
      "attention": attention,
      "ffn_norm": t.norm(config, layer + "post_attention_layernorm"),
      "moe": {
        "router": t.stack(config, layer + "mlp.gate.weight"),
        "gate_up": np.stack(gate_up, axis=1),
        "down": np.stack(down, axis=1),
      },
    },
    "final_norm": {"scale": t.pop("model.norm.weight")},
    "lm_head": {"kernel": t.pop("lm_head.weight").T},
  }


def llada_params(config: ModelConfig, t: Tensors) -> dict:
  layer = "model.transformer.blocks.{}."
  ffn = {"gate": "ff_proj", "up": "up_proj", "down": "ff_out"}
  return {
    "embed": {"embedding": t.pop("model.transformer.wte.weight")},
    "dense_layers": {
      "attention_norm": t.norm(config, layer + "attn_norm"),
      "attention": t.attention(config, layer, out="attn_out"),
      "ffn_norm": t.norm(config, layer + "ff_norm"),
      "ffn": {
        ours: {"kernel": t.stack(config, f"{layer}{theirs}.weight")} for ours, theirs in ffn.items()
      },
    },
    "final_norm": {"scale": t.pop("model.transformer.ln_f.weight")},
    "lm_head": {"kernel": t.pop("model.transformer.ff_out.weight").T},
  }


LAYOUTS = {
  "lladamoe_tiny": (lladamoe_config, lladamoe_params),
  "llada_dense": (llada_config, llada_params),
}


@functools.cache
def load(name: str):
  """(config, params, golden arrays); every tensor used once, every parameter filled."""
  config_of, params_of = LAYOUTS[name]
  config = config_of(json.loads((GOLDENS / name / "config.json").read_text()))
  tensors = Tensors(safetensors.load_file(GOLDENS / name / "model.safetensors"))
  params = params_of(config, tensors)
  assert not tensors, f"not mapped: {sorted(tensors)}"
  shapes = jax.tree.map(lambda x: x.shape, (params, abstract_params(config)))
  assert shapes[0] == shapes[1]
  return config, params, np.load(GOLDENS / name / "golden.npz")


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits(name):
  config, params, golden = load(name)
  logits, _ = jax.jit(Transformer(config).apply)({"params": params}, golden["tokens"])
  np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)
  assert np.abs(golden["logits"]).max() > 0.5


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_decoding(name, index):
  config, params, golden = load(name)
  prompts = golden[f"gen{index}_prompt"]
  sampler = SamplerConfig(unmask=LowConfidence(), **json.loads(str(golden[f"gen{index}_args"])))
  result = generate(
    Denoiser(config),
    params,
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
