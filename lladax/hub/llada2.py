"""LLaDA2.0-mini and -flash (arXiv 2512.15745), also with the experts stacked as dFactory has them."""

from __future__ import annotations

from lladax.hub.family import (
  Family,
  check_attention,
  check_computed,
  given,
  need,
  partial_rotary_factor,
  usual_fields,
  usual_keys,
)
from lladax.hub.names import Names
from lladax.models import ModelConfig
from lladax.moe import MoEConfig, SigmoidBias

COMPUTED = {
  "hidden_act": ("silu",),
  "attention_dropout": (0,),
  "embedding_dropout": (0,),
  "output_dropout": (0,),
  "moe_router_enable_expert_bias": (True,),
  "norm_head": (False,),
  "norm_softmax": (False,),
  "norm_topk_prob": (True,),
  "router_dtype": ("fp32", "float32"),
  "score_function": ("sigmoid",),
  "use_bias": (False,),
  "use_qk_norm": (True,),
  "use_rmsnorm": (True,),
  "using_split_qkv_in_self_attention": (False,),
}


class Llada2(Family):
  """The published code divides by the sum of the weights where more than one expert is chosen."""

  def model_config(self, config, *, ids, dtype) -> ModelConfig:
    check_computed(config, COMPUTED)
    check_attention(config)
    width, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    head_dim = given(config, "head_dim", None) or width // max(heads, 1)
    first_k_dense = given(config, "first_k_dense_replace", 0)
    return ModelConfig(
      num_key_value_heads=given(config, "num_key_value_heads", None) or None,
      head_dim=head_dim,
      intermediate_size=need(config, "intermediate_size") if first_k_dense else None,
      moe=_experts(config),
      first_k_dense=first_k_dense,
      partial_rotary_factor=_rotary_share(config, head_dim),
      attention_bias=given(config, "use_qkv_bias", False, bool),
      **usual_fields(config, ids, dtype),
    )

  def hf_config(self, config) -> dict:
    moe = config.moe
    if moe is None:
      raise ValueError("moe=None")
    if not isinstance(moe.router, SigmoidBias):
      raise ValueError(f"moe.router={moe.router!r}")
    shared = moe.shared_expert_intermediate_size or 0
    return {
      **usual_keys(config),
      "architectures": [self.architectures[0]],
      "embedding_dropout": 0.0,
      "first_k_dense_replace": config.first_k_dense,
      "head_dim": config.head_size,
      "intermediate_size": config.intermediate_size,
      "mask_token_id": config.mask_token_id,
      "max_window_layers": 28,
      "model_type": self.model_types[0],
      "moe_intermediate_size": moe.expert_intermediate_size,
      "moe_router_enable_expert_bias": True,
      "n_group": moe.router.n_group,
      "norm_head": False,
      "norm_softmax": False,
      "norm_topk_prob": True,
      "num_experts": moe.num_experts,
      "num_experts_per_tok": moe.num_experts_per_tok,
      "num_shared_experts": shared // moe.expert_intermediate_size or None,
      "output_dropout": 0.0,
      "output_router_logits": False,
      "partial_rotary_factor": config.partial_rotary_factor,
      "rotary_dim": config.rotary_size,
      "routed_scaling_factor": moe.router.routed_scaling_factor,
      "router_dtype": "fp32",
      "score_function": "sigmoid",
      "topk_group": moe.router.topk_group,
      "use_bias": False,
      "use_cache": False,
      "use_qk_norm": True,
      "use_qkv_bias": config.attention_bias,
      "use_rmsnorm": True,
      "use_sliding_window": False,
      "using_split_qkv_in_self_attention": False,
    }


def _experts(config) -> MoEConfig:
  width, chosen = need(config, "moe_intermediate_size"), need(config, "num_experts_per_tok")
  shared = given(config, "num_shared_experts", 0)
  return MoEConfig(
    num_experts=need(config, "num_experts"),
    num_experts_per_tok=chosen,
    expert_intermediate_size=width,
    shared_expert_intermediate_size=shared * width if shared else None,
    router=SigmoidBias(
      n_group=given(config, "n_group", 1),
      topk_group=given(config, "topk_group", 1),
      norm_topk_prob=chosen > 1,
      routed_scaling_factor=given(config, "routed_scaling_factor", 1.0, float),
    ),
  )


def _rotary_share(config, head_dim: int) -> float:
  """From the factor or the number of rotated dimensions, which must agree."""
  rotated = given(config, "rotary_dim", None)
  factor = partial_rotary_factor(config)
  if factor is None:
    return 1.0 if rotated is None else rotated / head_dim
  if rotated is not None and int(factor * head_dim) != rotated:
    raise ValueError(
      f"config.json: rotary_dim is {rotated}, but partial_rotary_factor={factor} of "
      f"head_dim={head_dim} is {int(factor * head_dim)}"
    )
  return factor


LLADA2 = Llada2(
  name="llada2",
  architectures=("LLaDA2MoeModelLM", "LLaDA2MoeModel"),
  model_types=("llada2_moe", "llada2_moe_veomni"),
  marker="moe_intermediate_size",
  published_ids={"mask_token_id": 156_895, "eos_token_id": 156_892, "pad_token_id": 156_892},
  chat_template="llada_moe",
  names=Names(
    embedding="model.word_embeddings.weight",
    fused="attention.query_key_value",
    out="attention.dense",
    query_norm="attention.query_layernorm.weight",
    key_norm="attention.key_layernorm.weight",
    expert_bias="mlp.gate.expert_bias",
    shared="mlp.shared_experts.",
    stacked="mlp.experts.",
  ),
)
