"""The architecture of every model of the family as one config, its presets and parameter counts."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp

from lladax.moe.layer import MoEConfig

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A pre-norm transformer; LLaDA-MoE, LLaDA and their relatives are settings of it.

  Attributes:
    vocab_size: V, rows of the embedding.
    hidden_size: D.
    num_hidden_layers: n.
    num_attention_heads: N.
    num_key_value_heads: K, dividing N; None: N (plain multi-head attention).
    head_dim: H; None: D / N.
    intermediate_size: F of the dense feed-forward layers; None where every layer is routed.
    moe: the routed layers' experts; None: a dense model.
    first_k_dense: how many of the first layers are dense in a routed model.
    max_position_embeddings: longest sequence the model was trained on, in tokens.
    rope_theta: base of the rotary frequencies.
    partial_rotary_factor: fraction of each head that is rotated (its first dimensions).
    rms_norm_eps: epsilon of every RMSNorm.
    qk_norm: RMSNorm over each head's query and key before rotary (one scale [H] for all heads).
    attention_bias: biases in the query, key and value projections (Qwen2, Dream).
    tie_word_embeddings: the output head is the embedding, transposed.
    initializer_range: standard deviation of the normal initialisation of every matrix.
    mask_token_id, eos_token_id, pad_token_id: special ids, below vocab_size.
    dtype: of activations and matrix products, "float32" or "bfloat16"; router, norms and logits
      are float32 in any case.
    param_dtype: of the parameters.
    remat: what the backward pass recomputes: "none", "full" (every layer from its input), "dots"
      (all but matrix products).
    scan_unroll: layers unrolled per iteration of the scan over layers; it trades compile time
      for speed.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int | None = None
  head_dim: int | None = None
  intermediate_size: int | None = None
  moe: MoEConfig | None = None
  first_k_dense: int = 0
  max_position_embeddings: int = 4096
  rope_theta: float = 10_000.0
  partial_rotary_factor: float = 1.0
  rms_norm_eps: float = 1e-5
  qk_norm: bool = True
  attention_bias: bool = False
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02
  mask_token_id: int
  eos_token_id: int
  pad_token_id: int
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  scan_unroll: int = 1

  def __post_init__(self):
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
      self._expect(getattr(self, field) >= 1, field, "at least 1")
    for field in ("max_position_embeddings", "scan_unroll"):
      self._expect(getattr(self, field) >= 1, field, "at least 1")
    heads = self.num_attention_heads
    divides = self.kv_heads >= 1 and heads % self.kv_heads == 0
    self._expect(divides, "num_key_value_heads", f"a divisor of num_attention_heads={heads}")
    if self.head_dim is None:
      divides = self.hidden_size % (2 * heads) == 0
      self._expect(
        divides, "hidden_size", f"a multiple of 2 x {heads} heads where head_dim is None"
      )
    else:
      even = self.head_dim >= 2 and self.head_dim % 2 == 0
      self._expect(even, "head_dim", "positive and even, for rotary")
    self._expect(0 < self.partial_rotary_factor <= 1, "partial_rotary_factor", "in (0, 1]")
    even = self.rotary_size >= 2 and self.rotary_size % 2 == 0
    self._expect(even, "partial_rotary_factor",
                 f"a positive even share of head_dim={self.head_size}")  # fmt: skip
    self._expect(0 <= self.first_k_dense <= self.num_hidden_layers, "first_k_dense", "0 to n")
    has_dense = self.moe is None or self.first_k_dense > 0
    self._expect(not has_dense or (self.intermediate_size or 0) >= 1, "intermediate_size",
                 "the width of the dense layers")  # fmt: skip
    self._expect(self.dtype in DTYPES, "dtype", f"one of {DTYPES}")
    self._expect(self.param_dtype in DTYPES, "param_dtype", f"one of {DTYPES}")
    self._expect(self.remat in REMAT_POLICIES, "remat", f"one of {REMAT_POLICIES}")
    for field in ("mask_token_id", "eos_token_id", "pad_token_id"):
      fits = 0 <= getattr(self, field) < self.vocab_size
      self._expect(fits, field, f"an id below vocab_size={self.vocab_size}")
    distinct = self.mask_token_id not in (self.eos_token_id, self.pad_token_id)
    self._expect(distinct, "mask_token_id", "another id than eos and pad")

  def _expect(self, holds: bool, field: str, expected: str):
    if not holds:
      raise ValueError(f"ModelConfig.{field}: expected {expected}, got {getattr(self, field)!r}")

  @property
  def kv_heads(self) -> int:
    return (
      self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads
    )

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

  @property
  def rotary_size(self) -> int:
    return int(self.head_size * self.partial_rotary_factor)

  @property
  def num_dense_layers(self) -> int:
    return self.num_hidden_layers if self.moe is None else self.first_k_dense

  @property
  def num_routed_layers(self) -> int:
    return self.num_hidden_layers - self.num_dense_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount:
  """Numbers of parameters.

  Attributes:
    total: all of them.
    embedding: the input embedding, and the output head where it is not tied.
    active: what one token touches: all but the experts it does not go to and the input embedding
      (a lookup). With the head, as in the "1.4B active" of LLaDA-MoE-7B-A1B.
    active_non_embedding: `active` without the head.
  """

  total: int
  embedding: int
  active: int
  active_non_embedding: int


def count_parameters(config: ModelConfig) -> ParameterCount:
  """Counts by tracing the initialisation (`jax.eval_shape`): nothing is allocated."""
  from lladax.models.transformer import abstract_params

  params = abstract_params(config)
  sizes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  total = sum(sizes.values())
  embedding = sizes["embed/embedding"]
  head = sizes.get("lm_head/kernel", embedding)
  idle = 0
  if config.moe is not None:
    experts = sum(s for path, s in sizes.items() if path.endswith(("moe/gate_up", "moe/down")))
    idle = experts * (config.moe.num_experts - config.moe.num_experts_per_tok)
    idle //= config.moe.num_experts
  body = total - embedding - (0 if config.tie_word_embeddings else head)
  return ParameterCount(
    total=total,
    embedding=total - body,
    active=body - idle + head,
    active_non_embedding=body - idle,
  )


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


def dtype_of(name: str) -> jnp.dtype:
  return jnp.dtype(name)
