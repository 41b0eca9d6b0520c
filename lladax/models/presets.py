"""The models of the papers, and small ones for studies, as settings of `ModelConfig`."""

from __future__ import annotations

from dataclasses import replace

from lladax.models.config import ModelConfig
from lladax.moe.layer import MoEConfig
from lladax.moe.router import SigmoidBias


def tiny(vocab_size: int = 2048, **changes) -> ModelConfig:
  """LLaDA-MoE in miniature, for a CPU: the ratios of the 7B (A = k / E = 1/8, head of 64)."""
  return replace(
    ModelConfig(
      vocab_size=vocab_size,
      hidden_size=256,
      num_hidden_layers=4,
      num_attention_heads=4,
      moe=MoEConfig(num_experts=16, num_experts_per_tok=2, expert_intermediate_size=256),
      max_position_embeddings=256,
      mask_token_id=1,
      eos_token_id=0,
      pad_token_id=0,
    ),
    **changes,
  )


def proxy_25m(**changes) -> ModelConfig:
  """The proxy of the CPU benchmark: 24.7M parameters, 6.1M active with the head."""
  return replace(tiny(vocab_size=8192, num_hidden_layers=6), **changes)


# Width, layers, heads and experts of the ladder of proxies. Active experts are an eighth of all
# and the expert is half as wide as the model, as in LLaDA-MoE-7B-A1B (A = 12.5 %, G = 4).
PROXIES = {
  "proxy_3m": (128, 4, 2, 16),
  "proxy_9m": (192, 6, 3, 16),
  "proxy_40m": (320, 8, 5, 32),
  "proxy_150m": (512, 10, 8, 48),
  "proxy_500m": (768, 14, 12, 64),
}


def proxy(name: str, vocab_size: int = 8192, **changes) -> ModelConfig:
  """One rung of `PROXIES`: small LLaDA-MoE models for scaling studies.

  The name gives the order of magnitude of the total parameters at the default vocabulary.

  Raises:
    ValueError: for a name that is not in `PROXIES`.
  """
  if name not in PROXIES:
    raise ValueError(f"unknown proxy {name!r}; one of {', '.join(PROXIES)}")
  hidden_size, layers, heads, experts = PROXIES[name]
  moe = MoEConfig(
    num_experts=experts,
    num_experts_per_tok=experts // 8,
    expert_intermediate_size=hidden_size // 2,
  )
  return replace(
    tiny(vocab_size=vocab_size),
    **{
      "hidden_size": hidden_size,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "moe": moe,
      "max_position_embeddings": 4096,
      **changes,
    },
  )


def llada_moe_7b_a1b(**changes) -> ModelConfig:
  """LLaDA-MoE-7B-A1B, Base and Instruct (arXiv 2509.24389, table 2 and the released config)."""
  return replace(
    ModelConfig(
      vocab_size=157_184,
      hidden_size=2048,
      num_hidden_layers=16,
      num_attention_heads=16,
      head_dim=128,
      moe=MoEConfig(num_experts=64, num_experts_per_tok=8, expert_intermediate_size=1024),
      max_position_embeddings=8192,
      rope_theta=50_000.0,
      mask_token_id=156_895,
      eos_token_id=156_892,
      pad_token_id=156_892,
      dtype="bfloat16",
      remat="full",
    ),
    **changes,
  )


def llada_8b(**changes) -> ModelConfig:
  """LLaDA-8B, Base and Instruct, and LLaDA-1.5 (arXiv 2502.09992 and the released config)."""
  return replace(
    ModelConfig(
      vocab_size=126_464,
      hidden_size=4096,
      num_hidden_layers=32,
      num_attention_heads=32,
      intermediate_size=12_288,
      max_position_embeddings=4096,
      rope_theta=500_000.0,
      qk_norm=False,
      mask_token_id=126_336,
      eos_token_id=126_081,
      pad_token_id=126_081,
      dtype="bfloat16",
      remat="full",
    ),
    **changes,
  )


def llada2_mini(**changes) -> ModelConfig:
  """LLaDA2.0-mini, 16B-A1.4B (arXiv 2512.15745 and the released config; context of 2.0)."""
  return replace(
    ModelConfig(
      vocab_size=157_184,
      hidden_size=2048,
      num_hidden_layers=20,
      num_attention_heads=16,
      num_key_value_heads=4,
      head_dim=128,
      intermediate_size=5120,
      moe=MoEConfig(
        num_experts=256,
        num_experts_per_tok=8,
        expert_intermediate_size=512,
        shared_expert_intermediate_size=512,
        router=SigmoidBias(n_group=8, topk_group=4, routed_scaling_factor=2.5),
      ),
      first_k_dense=1,
      max_position_embeddings=16_384,
      rope_theta=600_000.0,
      partial_rotary_factor=0.5,
      rms_norm_eps=1e-6,
      mask_token_id=156_895,
      eos_token_id=156_892,
      pad_token_id=156_892,
      dtype="bfloat16",
      remat="full",
    ),
    **changes,
  )


def llada2_flash(**changes) -> ModelConfig:
  """LLaDA2.0-flash, 103B-A6.1B (arXiv 2512.15745 and the released config)."""
  mini = llada2_mini()
  moe = replace(mini.moe, expert_intermediate_size=1024, shared_expert_intermediate_size=1024)
  flash = replace(
    mini,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=9216,
    moe=moe,
  )
  return replace(flash, **changes)


# Width, layers, heads, key heads, feed-forward width, tied embeddings, vocabulary.
QWEN2_5 = {
  "0.5b": (896, 24, 14, 2, 4864, True, 151_936),
  "1.5b": (1536, 28, 12, 2, 8960, True, 151_936),
  "3b": (2048, 36, 16, 2, 11_008, True, 151_936),
  "7b": (3584, 28, 28, 4, 18_944, False, 152_064),
}


def qwen2_5(size: str, **changes) -> ModelConfig:
  """Qwen2.5 (arXiv 2412.15115), the autoregressive baseline: causal, no mask token.

  End of text is `<|im_end|>` as in the Instruct models; the Base models end with the padding id.

  Raises:
    ValueError: for a size that is not in `QWEN2_5`.
  """
  if size not in QWEN2_5:
    raise ValueError(f"unknown size {size!r} of Qwen2.5; one of {', '.join(QWEN2_5)}")
  width, layers, heads, kv_heads, intermediate, tied, vocabulary = QWEN2_5[size]
  return replace(
    ModelConfig(
      vocab_size=vocabulary,
      hidden_size=width,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      num_key_value_heads=kv_heads,
      intermediate_size=intermediate,
      max_position_embeddings=32_768,
      rope_theta=1_000_000.0,
      rms_norm_eps=1e-6,
      qk_norm=False,
      attention_bias=True,
      causal=True,
      shift=True,
      tie_word_embeddings=tied,
      mask_token_id=None,
      eos_token_id=151_645,
      pad_token_id=151_643,
      dtype="bfloat16",
      remat="full",
    ),
    **changes,
  )


def dream_7b(**changes) -> ModelConfig:
  """Dream-7B, Base and Instruct (arXiv 2508.15487): Qwen2.5-7B made bidirectional, still shifted."""
  dream = replace(
    qwen2_5("7b"),
    causal=False,
    max_position_embeddings=2048,
    mask_token_id=151_666,
    eos_token_id=151_643,
  )
  return replace(dream, **changes)
