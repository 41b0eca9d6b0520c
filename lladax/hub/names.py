"""What the tensors of a checkpoint are called, and the rows that follow from it.

All families are one transformer, so their tables differ in names, and in what is stored in one
tensor: `Names` holds those, `rows` writes the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator

from lladax.hub.mapping import Row
from lladax.models import ModelConfig

# torch stores a linear map as (out, in).
MATRIX = "o i -> i o"
VECTOR = "d -> d"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
  """Names in one published layout; those of layers follow `layer`, those of experts `expert`.

  Defaults are the names of Llama-like models, which LLaDA-MoE and Qwen2 have.

  Attributes:
    embedding, final_norm, head: of the whole model.
    layer: prefix of a layer, with `{n}`.
    query, key, value: without ".weight" and ".bias"; `fused` instead where one tensor holds all.
    dense: prefix of a dense layer's feed-forward matrices.
    shared: prefix of the shared expert's.
    expert: prefix of one expert's matrices, with `{e}`.
    joined: the two tensors of a layer that hold all experts, [E, 2F, D] (gate first) and [E, D, F],
      as some tools write them; None: no tool is known to.
    stacked: prefix of three tensors [E, out, in] for all experts; None as above.
  """

  embedding: str = "model.embed_tokens.weight"
  final_norm: str = "model.norm.weight"
  head: str = "lm_head.weight"
  layer: str = "model.layers.{n}."
  attention_norm: str = "input_layernorm.weight"
  ffn_norm: str = "post_attention_layernorm.weight"
  query: str = "self_attn.q_proj"
  key: str = "self_attn.k_proj"
  value: str = "self_attn.v_proj"
  fused: str | None = None
  out: str = "self_attn.o_proj"
  query_norm: str = "self_attn.q_norm.weight"
  key_norm: str = "self_attn.k_norm.weight"
  dense: str = "mlp."
  gate: str = "gate_proj"
  up: str = "up_proj"
  down: str = "down_proj"
  router: str = "mlp.gate.weight"
  expert_bias: str = "mlp.expert_bias"
  shared: str = "mlp.shared_expert."
  expert: str = "mlp.experts.{e}."
  joined: tuple[str, str] | None = None
  stacked: str | None = None


def rows(names: Names, config: ModelConfig, present: Collection[str]) -> Iterator[Row]:
  """The table of one checkpoint.

  Args:
    names: how the family calls its tensors.
    config: says which of them there are.
    present: names of the tensors of a folder, which decide between published and fused experts
      and tell whether a tied head is stored; empty: the published form.
  """
  embed = (names.embedding,)
  if config.tie_word_embeddings:
    repeated = names.head in present
    tensors = (*embed, names.head) if repeated else embed
    yield Row(params=("embed/embedding",), tensors=tensors, pattern="v d -> v d", repeated=repeated)
  else:
    yield Row(params=("embed/embedding",), tensors=embed, pattern="v d -> v d")
    yield Row(params=("lm_head/kernel",), tensors=(names.head,), pattern=MATRIX)
  yield Row(params=("final_norm/scale",), tensors=(names.final_norm,), pattern=VECTOR)
  for stack, layers in stacks(config):
    row = functools.partial(_row, stack, names.layer, layers=layers)
    yield row(("attention_norm/scale",), (names.attention_norm,), VECTOR)
    yield row(("ffn_norm/scale",), (names.ffn_norm,), VECTOR)
    yield from _attention(row, names, config)
    if stack == "dense_layers":
      yield from _swiglu(row, "ffn", names.dense, names)
    else:
      yield from _experts(row, names, config, present)


def stacks(config: ModelConfig) -> Iterator[tuple[str, range]]:
  """Name of each stack of layers in the parameter tree, and the layers' absolute numbers."""
  n, dense = config.num_hidden_layers, config.num_dense_layers
  if dense:
    yield "dense_layers", range(dense)
  if n > dense:
    yield "layers", range(dense, n)


def _row(stack, layer, params, tensors, pattern, **fields) -> Row:
  return Row(
    params=tuple(f"{stack}/{param}" for param in params),
    tensors=tuple(layer + tensor for tensor in tensors),
    pattern=pattern,
    **fields,
  )


def _attention(row, names: Names, config: ModelConfig) -> Iterator[Row]:
  N, K, H = config.num_attention_heads, config.kv_heads, config.head_size
  kinds = [("kernel", ".weight", "(n h) d -> d n h", 1)]
  if config.attention_bias:
    kinds.append(("bias", ".bias", "(n h) -> n h", 0))
  row_of_heads = functools.partial(row, sizes=(("h", H),))
  for param, ending, pattern, heads_axis in kinds:
    params = [f"attention/{part}/{param}" for part in ("query", "key", "value")]
    if names.fused is not None:
      fused = names.fused + ending
      yield row_of_heads(params, (fused,), pattern, split=(N, K, K), split_axis=heads_axis)
    else:
      for path, tensor in zip(params, (names.query, names.key, names.value), strict=True):
        yield row_of_heads((path,), (tensor + ending,), pattern)
  yield row_of_heads(("attention/out/kernel",), (names.out + ".weight",), "d (n h) -> n h d")
  if config.qk_norm:
    yield row(("attention/query_norm/scale",), (names.query_norm,), VECTOR)
    yield row(("attention/key_norm/scale",), (names.key_norm,), VECTOR)


def _swiglu(row, path: str, prefix: str, names: Names) -> Iterator[Row]:
  for part, name in (("gate", names.gate), ("up", names.up), ("down", names.down)):
    yield row((f"{path}/{part}/kernel",), (f"{prefix}{name}.weight",), MATRIX)


def _experts(row, names: Names, config: ModelConfig, present: Collection[str]) -> Iterator[Row]:
  yield row(("moe/router",), (names.router,), MATRIX)
  if config.moe.router.has_bias:
    # Ling 2.0 moves it in steps of 1e-3, too small for bfloat16 (arXiv 2510.22115).
    yield row(("moe/expert_bias",), (names.expert_bias,), VECTOR, dtype="float32")
  gate_up, down = ("moe/gate_up",), ("moe/down",)
  stacked = "e o i -> e i o"

  def here(tensor):
    """Whether the first routed layer has this tensor."""
    return (names.layer + tensor).format(n=config.num_dense_layers) in present

  if names.joined and here(names.joined[0]):
    yield row(gate_up, names.joined[:1], stacked)
    yield row(down, names.joined[1:], stacked)
  elif names.stacked and here(names.stacked + names.gate):
    both = (names.stacked + names.gate, names.stacked + names.up)
    yield row(gate_up, both, stacked, join_axis=1)
    yield row(down, (names.stacked + names.down,), stacked)
  else:
    each = functools.partial(row, experts=config.moe.num_experts)
    gate, up, out = (f"{names.expert}{x}.weight" for x in (names.gate, names.up, names.down))
    yield each(gate_up, (gate, up), MATRIX)
    yield each(down, (out,), MATRIX)
  if config.moe.shared_expert_intermediate_size is not None:
    yield from _swiglu(row, "shared_expert", names.shared, names)
