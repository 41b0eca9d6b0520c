"""LLaDA-8B, Base and Instruct (arXiv 2502.09992), and LLaDA-1.5 (arXiv 2505.19223)."""

from __future__ import annotations

from lladax.hub.family import (
  Family,
  check_attention,
  check_computed,
  check_whole_heads,
  given,
  need,
  stored_fields,
)
from lladax.hub.names import Names
from lladax.models import ModelConfig

COMPUTED = {
  "attention_dropout": (0,),
  "embedding_dropout": (0,),
  "residual_dropout": (0,),
  "alibi": (False,),
  "attention_layer_norm": (False,),
  "bias_for_layer_norm": (False,),
  "block_group_size": (1,),
  "clip_qkv": (),
  "include_bias": (False,),
  "input_emb_norm": (False,),
  "layer_norm_with_affine": (True,),
  "multi_query_attention": (False,),
  "scale_logits": (False,),
}

# Where the published class would take something else for a missing key.
SAID = {
  "activation_type": "silu",
  "block_type": "llama",
  "layer_norm_type": "rms",
  "rope": True,
}


class Llada(Family):
  """The keys are those of OLMo. `weight_tying` counts; `tie_word_embeddings` is not read."""

  def model_config(self, config, *, ids, dtype) -> ModelConfig:
    check_computed(config, COMPUTED)
    check_attention(config)
    check_whole_heads(config)
    for key, value in SAID.items():
      if config.get(key) != value:
        raise ValueError(
          f"config.json: {key} is {config.get(key)!r}; lladax computes {value!r} there"
        )
    width = need(config, "d_model")
    return ModelConfig(
      vocab_size=given(config, "embedding_size", None) or need(config, "vocab_size"),
      hidden_size=width,
      num_hidden_layers=need(config, "n_layers"),
      num_attention_heads=need(config, "n_heads"),
      num_key_value_heads=given(config, "n_kv_heads", None),
      intermediate_size=(
        given(config, "mlp_hidden_size", None) or need(config, "mlp_ratio") * width
      ),
      max_position_embeddings=need(config, "max_sequence_length"),
      qk_norm=False,
      attention_bias=given(config, "include_qkv_bias", False, bool),
      tie_word_embeddings=need(config, "weight_tying", bool),
      initializer_range=given(config, "init_std", 0.02, float),
      **stored_fields(config, ids, dtype),
    )

  def hf_config(self, config) -> dict:
    if config.intermediate_size is None:
      raise ValueError("intermediate_size=None")
    return {
      "activation_type": "silu",
      "alibi": False,
      "alibi_bias_max": 8.0,
      "architectures": [self.architectures[0]],
      "attention_dropout": 0.0,
      "attention_layer_norm": False,
      "attention_layer_norm_with_affine": True,
      "bias_for_layer_norm": False,
      "block_group_size": 1,
      "block_type": "llama",
      "d_model": config.hidden_size,
      "embedding_dropout": 0.0,
      "embedding_size": config.vocab_size,
      "eos_token_id": config.eos_token_id,
      "flash_attention": False,
      "include_bias": False,
      "include_qkv_bias": config.attention_bias,
      "init_device": "cpu",
      "init_fn": "normal",
      "init_std": config.initializer_range,
      "input_emb_norm": False,
      "layer_norm_type": "rms",
      "layer_norm_with_affine": True,
      "mask_token_id": config.mask_token_id,
      "max_sequence_length": config.max_position_embeddings,
      "mlp_hidden_size": config.intermediate_size,
      "mlp_ratio": 4,
      "model_type": self.model_types[0],
      "multi_query_attention": None,
      "n_heads": config.num_attention_heads,
      "n_kv_heads": config.kv_heads,
      "n_layers": config.num_hidden_layers,
      "pad_token_id": config.pad_token_id,
      "residual_dropout": 0.0,
      "rms_norm_eps": config.rms_norm_eps,
      "rope": True,
      "rope_full_precision": True,
      "rope_theta": config.rope_theta,
      "scale_logits": False,
      "tie_word_embeddings": config.tie_word_embeddings,
      "torch_dtype": config.param_dtype,
      "use_cache": False,
      "vocab_size": config.vocab_size,
      "weight_tying": config.tie_word_embeddings,
    }


LLADA = Llada(
  name="llada",
  architectures=("LLaDAModelLM", "LLaDAModel"),
  model_types=("llada",),
  marker="d_model",
  published_ids={"mask_token_id": 126_336, "eos_token_id": 126_081, "pad_token_id": 126_081},
  chat_template="llada",
  names=Names(
    embedding="model.transformer.wte.weight",
    final_norm="model.transformer.ln_f.weight",
    head="model.transformer.ff_out.weight",
    layer="model.transformer.blocks.{n}.",
    attention_norm="attn_norm.weight",
    ffn_norm="ff_norm.weight",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="attn_out",
    dense="",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
  ),
)
