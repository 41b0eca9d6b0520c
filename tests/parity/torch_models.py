"""Torch models of `transformers` with our weights in them, through the table of names.

Each relative stands for some fields: Llama for LLaDA-8B, Qwen2 for itself and Dream, Qwen3-MoE for
LLaDA-MoE, GLM-4.5 (glm4_moe) for LLaDA2.0. OLMoE and Qwen2-MoE match none: the first normalises
queries over all heads at once, the second gates its shared expert.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from lladax.hub import names as names_
from lladax.hub.export import named_tensors
from lladax.hub.plan import named_leaves
from lladax.models import ModelConfig, init_params
from lladax.moe import MoEConfig, SigmoidBias, TopKSoftmax

VOCABULARY, WIDTH = 64, 32


@dataclasses.dataclass(frozen=True)
class Relative:
  """A torch class and the fields that it has.

  Attributes:
    model: its name in `transformers`.
    draw: random numbers -> fields of a `ModelConfig`.
    torch_fields: our config -> fields of its config beside those that all have.
    names: of its tensors.
  """

  model: str
  draw: Callable[[np.random.Generator], dict]
  torch_fields: Callable[[ModelConfig], dict] = lambda config: {}
  names: names_.Names = names_.Names()

  def config(self, seed: int) -> ModelConfig:
    """A random small config."""
    random = np.random.default_rng([seed, *self.model.encode()])
    heads, kv_heads = [(4, 4), (4, 2), (4, 1), (2, 2)][random.integers(4)]
    return ModelConfig(
      **{
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": int(random.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": int(random.choice([8, 16])),
        "rope_theta": float(random.choice([1e4, 5e4, 1e6])),
        "rms_norm_eps": float(random.choice([1e-5, 1e-6, 1e-2])),
        "tie_word_embeddings": bool(random.integers(2)),
        "causal": bool(random.integers(2)),
        "shift": bool(random.integers(2)),
        "initializer_range": 0.2,
        "mask_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **self.draw(random),
      }
    )

  def torch_config(self, config: ModelConfig):
    """The same as a config of `transformers`."""
    cls = getattr(transformers, self.model).config_class
    return cls(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size or 8,
      num_hidden_layers=config.num_hidden_layers,
      num_attention_heads=config.num_attention_heads,
      num_key_value_heads=config.kv_heads,
      head_dim=config.head_size,
      rope_theta=config.rope_theta,
      rms_norm_eps=config.rms_norm_eps,
      tie_word_embeddings=config.tie_word_embeddings,
      attention_bias=config.attention_bias,
      max_position_embeddings=64,
      **self.torch_fields(config),
    )

  def write(self, folder, config: ModelConfig, params):
    """A folder as this relative would publish it, with our weights."""
    named = named_tensors(names_.rows(self.names, config, ()), named_leaves(params))
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in named}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    self.torch_config(config).save_pretrained(folder)


def load(folder, model: str):
  """The torch model of a folder; every tensor must find its place."""
  found, info = getattr(transformers, model).from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  assert not {kind: names for kind, names in info.items() if names}
  return found.eval()


def torch_logits(model, config: ModelConfig, tokens, positions, segment_ids) -> np.ndarray:
  """Its logits under our rules: who sees whom, and which one predicts which token."""
  seen = segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, L, L]
  if config.causal:
    seen &= np.tril(np.ones(seen.shape[1:], bool))
  mask = torch.from_numpy(np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32))
  with torch.no_grad():
    logits = model(
      input_ids=torch.from_numpy(np.asarray(tokens, np.int64)),
      position_ids=torch.from_numpy(np.asarray(positions, np.int64)),
      attention_mask=mask[:, None],
      use_cache=False,
    ).logits.numpy()
  if config.shift:
    before = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
    logits = np.where((positions == 0)[..., None], logits, before)
  return logits


def random_params(config: ModelConfig, seed: int):
  """Parameters in which no scale is one and no bias is zero, so that each of them matters."""
  params = init_params(config, jax.random.key(seed))
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + random.normal(size=x.shape, scale=0.1).astype(x.dtype), params)


def _moe(random, router, **fields):
  experts = int(random.choice([4, 8]))
  return MoEConfig(
    num_experts=experts,
    num_experts_per_tok=int(random.integers(1, experts // 2 + 1)),
    expert_intermediate_size=16,
    router=router,
    **fields,
  )


def _llama(random):
  return {"intermediate_size": 48, "qk_norm": False}


def _qwen2(random):
  return {"intermediate_size": 48, "qk_norm": False, "attention_bias": True, "head_dim": None}


def _qwen3(random):
  return {"intermediate_size": 48}


def _qwen3_moe(random):
  router = TopKSoftmax(norm_topk_prob=bool(random.integers(2)))
  return {
    "moe": _moe(random, router),
    "first_k_dense": int(random.integers(2)),
    "intermediate_size": 48,
  }


def _glm4_moe(random):
  n_group = int(random.choice([1, 2]))
  router = SigmoidBias(
    n_group=n_group,
    topk_group=int(random.integers(1, n_group + 1)),
    norm_topk_prob=bool(random.integers(2)),
    routed_scaling_factor=float(random.choice([1.0, 2.5])),
  )
  return {
    "moe": _moe(random, router, shared_expert_intermediate_size=16),
    "first_k_dense": int(random.integers(2)),
    "intermediate_size": 48,
    "qk_norm": bool(random.integers(2)),
    "attention_bias": bool(random.integers(2)),
    "partial_rotary_factor": float(random.choice([0.5, 1.0])),
  }


def _experts(config: ModelConfig) -> dict:
  return {
    "moe_intermediate_size": config.moe.expert_intermediate_size,
    "num_experts_per_tok": config.moe.num_experts_per_tok,
    "norm_topk_prob": config.moe.router.norm_topk_prob,
  }


def _qwen3_moe_fields(config: ModelConfig) -> dict:
  dense = list(range(config.first_k_dense))
  return _experts(config) | {"num_experts": config.moe.num_experts, "mlp_only_layers": dense}


def _glm4_moe_fields(config: ModelConfig) -> dict:
  router = config.moe.router
  return _experts(config) | {
    "n_routed_experts": config.moe.num_experts,
    "n_shared_experts": 1,
    "first_k_dense_replace": config.first_k_dense,
    "use_qk_norm": config.qk_norm,
    "partial_rotary_factor": config.partial_rotary_factor,
    "n_group": router.n_group,
    "topk_group": router.topk_group,
    "routed_scaling_factor": router.routed_scaling_factor,
  }


_glm4_names = functools.partial(
  names_.Names,
  expert_bias="mlp.gate.e_score_correction_bias",
  shared="mlp.shared_experts.",
)

RELATIVES = {
  "llama": Relative("LlamaForCausalLM", _llama),
  "qwen2": Relative("Qwen2ForCausalLM", _qwen2),
  "qwen3": Relative("Qwen3ForCausalLM", _qwen3),
  "qwen3_moe": Relative("Qwen3MoeForCausalLM", _qwen3_moe, _qwen3_moe_fields),
  "glm4_moe": Relative("Glm4MoeForCausalLM", _glm4_moe, _glm4_moe_fields, _glm4_names()),
}
