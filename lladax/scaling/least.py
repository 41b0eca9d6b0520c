"""The least that a train step must move between chips, from shapes alone.

Per chip and step, for parameters that lie as they lie and tokens that are where they are: every
weight is gathered for its layer in the forward pass, again where the layer is recomputed, its
gradient is scattered once, and the exchange moves tokens once there and once back. A compiled
program is compared with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import jax

from lladax.models import ModelConfig
from lladax.moe import Fsdp

BATCH_AXES = ("data", "fsdp", "expert", "context")  # what tokens are split over
EXPERTS = ("gate_up", "down")


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes that a chip must receive per step, for one purpose."""

  kind: str
  axes: tuple[str, ...]
  purpose: str
  bytes: float


def least_traffic(
  model: ModelConfig,
  params,
  mesh_sizes: dict[str, int],
  tokens_per_chip: float,
  *,
  microbatches: int = 1,
  supervised: float = 1.0,
) -> list[Need]:
  """All needs of a train step.

  Args:
    params: abstract parameters with `NamedSharding`s.
    tokens_per_chip: of the whole step.
  """
  total: Counter = Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for need in _weight(model, name, leaf, mesh_sizes, tokens_per_chip, microbatches):
      total[need.kind, need.axes, need.purpose] += need.bytes
  for need in _activations(model, mesh_sizes, tokens_per_chip, supervised):
    total[need.kind, need.axes, need.purpose] += need.bytes
  return [Need(*key, bytes=value) for key, value in total.items() if value]


def _weight(model, name, leaf, sizes, tokens, microbatches):
  split = _axes_of(leaf.sharding.spec, sizes)
  # The head's rows are split over the tensor axis, too: its weights are gathered over all axes.
  stays = set() if "lm_head" in name else {"tensor"}
  if name.rpartition("/")[2] in EXPERTS and "moe" in name and not _gathers_experts(model):
    stays.add("expert")
  gathered = tuple(axis for axis in split if axis not in stays)
  kept = math.prod(sizes[axis] for axis in split if axis in stays)
  item = 4 if "router" in name or "scale" in name else _bytes_of(model.dtype)
  whole = leaf.size * item / kept
  share = _received(gathered, sizes)
  embedding = name.endswith("embed/embedding")
  if gathered and embedding and tokens * model.hidden_size * item < whole:
    # The looked-up rows are less than the table; and so are their gradients.
    moved = share * tokens * model.hidden_size * item
    yield Need("all-to-all", gathered, "rows of the embedding", 2 * moved)
  elif gathered:
    in_layers = "layers" in name
    passes = 2 if in_layers and model.remat != "none" else 1
    yield Need("all-gather", gathered, "weights, forward", share * whole * microbatches)
    if passes == 2:
      yield Need("all-gather", gathered, "weights, recomputation", share * whole * microbatches)
    yield Need("reduce-scatter", gathered, "gradients", share * whole)
  replicas = tuple(a for a in BATCH_AXES if sizes.get(a, 1) > 1 and a not in split)
  if replicas:
    part = whole / math.prod(sizes[axis] for axis in gathered)
    yield Need("all-reduce", replicas, "gradients", 2 * _received(replicas, sizes) * part)


def _activations(model, sizes, tokens, supervised):
  state = tokens * model.hidden_size * _bytes_of(model.dtype)  # one hidden state of all tokens
  again = model.remat != "none"
  expert, tensor, context = (sizes.get(axis, 1) for axis in ("expert", "tensor", "context"))
  routed, layers = model.num_routed_layers, model.num_hidden_layers
  if routed and expert > 1 and not _gathers_experts(model):
    if type(model.moe.exchange).__name__ == "Ring":
      there = (expert - 1) * state * routed
      yield Need("all-gather", ("expert",), "tokens to experts", (2 + again) * there)
      yield Need("reduce-scatter", ("expert",), "tokens to experts", 2 * there)
    else:
      kind = "ragged-all-to-all" if type(model.moe.exchange).__name__ == "Ragged" else "all-to-all"
      once = model.moe.num_experts_per_tok * state * (expert - 1) / expert * routed
      yield Need(kind, ("expert",), "tokens to experts", (4 + again) * once)
  if tensor > 1:
    once = 2 * (tensor - 1) / tensor * state
    yield Need("all-reduce", ("tensor",), "activations", (4 + again) * layers * once)
    yield Need("all-reduce", ("tensor",), "head", supervised * once)
  if context > 1:
    keys = 2 * tokens * model.kv_heads * model.head_size * _bytes_of(model.dtype) / tensor
    once = (context - 1) * keys * layers
    yield Need("all-gather", ("context",), "keys and values", (1 + again) * once)
    yield Need("reduce-scatter", ("context",), "keys and values", once)


def _gathers_experts(model: ModelConfig) -> bool:
  return model.moe is None or isinstance(model.moe.exchange, Fsdp)


def _axes_of(spec, sizes) -> tuple[str, ...]:
  """Mesh axes of more than one device that an array is split over."""
  names = [
    name for entry in spec if entry for name in ([entry] if isinstance(entry, str) else entry)
  ]
  return tuple(name for name in names if sizes.get(name, 1) > 1)


def _received(axes, sizes) -> float:
  devices = math.prod(sizes[axis] for axis in axes)
  return (devices - 1) / devices


def _bytes_of(dtype: str) -> int:
  return jax.numpy.dtype(dtype).itemsize
