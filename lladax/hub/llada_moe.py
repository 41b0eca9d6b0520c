"""LLaDA-MoE-7B-A1B, Base, Instruct and TD (arXiv 2509.24389), also in dInfer's fused form."""

from __future__ import annotations

from lladax.hub.family import (
  Family,
  check_attention,
  check_computed,
  check_whole_heads,
  given,
  need,
  usual_fields,
  usual_keys,
)
from lladax.hub.names import Names
from lladax.models import ModelConfig
from lladax.moe import MoEConfig, TopKSoftmax

COMPUTED = {
  "hidden_act": ("silu",),
  "attention_bias": (False,),  # there it would put one on the output projection, too
  "attention_dropout": (0,),
  "clip_qkv": (),
  "moe_router_score_function": ("softmax",),
  "routed_scaling_factor": (1,),
  # No groups; -2 is what the released file says.
  "router_num_group": (-2, 0, 1),
  "router_topk_group": (-2, 0, 1),
}


class LladaMoe(Family):
  """`norm_topk_prob` is not read: the published code never divides by the sum of the weights."""

  def model_config(self, config, *, ids, dtype) -> ModelConfig:
    check_computed(config, COMPUTED)
    check_attention(config)
    check_whole_heads(config)
    n = need(config, "num_hidden_layers")
    dense = _first_dense(config, n)
    moe = MoEConfig(
      num_experts=need(config, "num_experts"),
      num_experts_per_tok=need(config, "num_experts_per_tok"),
      expert_intermediate_size=need(config, "expert_intermediate_size"),
      shared_expert_intermediate_size=given(config, "shared_expert_intermediate_size", None),
      router=TopKSoftmax(
        expert_bias=given(config, "moe_router_enable_expert_bias", False, bool),
      ),
    )
    return ModelConfig(
      num_key_value_heads=given(config, "num_key_value_heads", None),
      intermediate_size=need(config, "dense_intermediate_size") if dense else None,
      moe=moe,
      first_k_dense=dense,
      qk_norm=given(config, "qk_layernorm", False, bool),
      **usual_fields(config, ids, dtype),
    )

  def hf_config(self, config) -> dict:
    moe = config.moe
    if moe is None:
      raise ValueError("moe=None")
    routed = config.num_routed_layers
    return {
      **usual_keys(config),
      "architectures": [self.architectures[0]],
      "attention_bias": False,
      "clip_qkv": None,
      "dense_intermediate_size": config.intermediate_size,
      "expert_intermediate_size": moe.expert_intermediate_size,
      "mask_token_id": config.mask_token_id,
      "model_type": self.model_types[0],
      "moe_layer_freq": [0] * config.num_dense_layers + [1] * routed,
      "moe_router_enable_expert_bias": moe.router.has_bias,
      "moe_router_score_function": "softmax",
      "norm_topk_prob": False,
      "num_experts": moe.num_experts,
      "num_experts_per_tok": moe.num_experts_per_tok,
      "output_router_logits": False,
      "partial_rotary_factor": 1,
      "qk_layernorm": config.qk_norm,
      "routed_scaling_factor": 1,
      "router_aux_loss_coef": 0.01,
      "router_num_group": -2,
      "router_topk_group": -2,
      "shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
      "use_cache": False,
    }


def _first_dense(config, n: int) -> int:
  """How many of the first layers are dense, from one flag per layer."""
  flags = given(config, "moe_layer_freq", [1] * n, list)
  dense = len(flags) - sum(bool(flag) for flag in flags)
  if len(flags) != n or any(flags[:dense]):
    raise ValueError(
      f"config.json: moe_layer_freq is {flags!r}; {n} flags are expected, first those of the dense "
      "layers (0), then those of the routed ones (1)"
    )
  return dense


LLADA_MOE = LladaMoe(
  name="llada_moe",
  architectures=(
    "LLaDAMoEModelLM",
    "LLaDAMoEModel",
    "FusedLLaDAMoEModelLM",  # dInfer
    "FusedOlmoeForCausalLM",
  ),
  model_types=("llada", "lladamoe"),
  marker="num_experts",
  published_ids={"mask_token_id": 156_895, "eos_token_id": 156_892, "pad_token_id": 156_892},
  chat_template="llada_moe",
  names=Names(joined=("mlp.w1", "mlp.w2")),
)
