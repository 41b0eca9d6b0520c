"""The architecture of every model of the family as one config, and parameter counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lladax.moe.layer import MoEConfig

DTYPES = ("float32", "bfloat16")
# Named by what the backward pass keeps; "full" and "dots" are keep_nothing and keep_dots.
REMAT_POLICIES = (
  "none", "full", "dots", "keep_nothing", "keep_dots", "keep_attention", "keep_routing",
  "keep_attention_and_routing",
)  # fmt: skip


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
    causal: a position attends to itself and earlier ones only (Qwen2, the autoregressive baseline).
    shift: the hidden state at i - 1 predicts token i (Dream, arXiv 2508.15487; Qwen2). The
      transformer shifts by itself: its prediction at i is always for token i. The first position of
      a document keeps its own, as Dream has it.
    tie_word_embeddings: the output head is the embedding, transposed.
    initializer_range: standard deviation of the normal initialisation of every matrix.
    mask_token_id, eos_token_id, pad_token_id: special ids, below vocab_size. A causal model may
      have no mask_token_id (None): it is scored and trained, but not decoded by unmasking.
    dtype: of activations and matrix products, "float32" or "bfloat16"; router, norms and logits
      are float32 in any case.
    param_dtype: of the parameters.
    remat: what the backward pass keeps of a layer, and does not recompute from its input: "none" (no
      recomputation: everything is kept), "keep_nothing" or "full", "keep_dots" or "dots" (matrix
      products), "keep_attention" (what attention's kernel gives, which is then not run again),
      "keep_routing" (the experts of each token, which are then those of the forward pass in the
      backward pass too, whatever rounding does), "keep_attention_and_routing".
    scan_unroll: layers unrolled per iteration of the scan over layers; it trades compile time
      for speed.
    stacked: the parameters of all layers of a kind are one stack, which a loop runs through. Otherwise
      each layer has its own and nothing is copied, for inference (`lladax.models.for_inference`).

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
  causal: bool = False
  shift: bool = False
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02
  mask_token_id: int | None
  eos_token_id: int
  pad_token_id: int
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  scan_unroll: int = 1
  stacked: bool = True

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
    given = self.mask_token_id is not None or self.causal
    self._expect(given, "mask_token_id", "an id; only a causal model can be without")
    for field in ("mask_token_id", "eos_token_id", "pad_token_id"):
      if getattr(self, field) is None and field == "mask_token_id":
        continue
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


def dtype_of(name: str) -> jnp.dtype:
  return jnp.dtype(name)
