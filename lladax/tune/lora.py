"""LoRA (arXiv 2106.09685): the weights stay as they are, a product of two thin matrices is learned.

An adapted weight is W + alpha / rank * A B. A layer gets W, A and B in place of W and adds them up
when it asks for the weight (`Adapted`), one layer at a time and again in the backward pass where
layers are recomputed: a merged copy of the model exists nowhere. The layers themselves know nothing
of it, so every mesh, exchange and kernel works.

What that saves is the memory of a full fine-tuning: gradients and moments exist for A and B alone,
the gradient of a weight for one layer at a time. A step of a model of 118M parameters (8 layers of 32
experts, float32, remat="full", 1,024 tokens) needs 722 MB at rank 8, 2,763 MB without LoRA, and 1,584
MB if the weights are merged before the layers (XLA's memory analysis for a CPU, jax 0.10.2). It does
not save its arithmetic, because that gradient is computed before it is multiplied with A and B.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from lladax.diffusion import Objective
from lladax.models import ModelConfig, init_variables
from lladax.sharding import constrain
from lladax.train import TrainState, make_diffusion_step

# Kernels that contract more than their first axis after those they are stacked along.
_INPUTS = {"attention/out/kernel": 2}
_STACKED = ("layers", "experts", "gathered_experts")  # logical axes of separate matrices
_EXPERTS = _STACKED[1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Which weights get adapters, and how large.

  Attributes:
    rank: r, columns of A and rows of B.
    alpha: the product is scaled by alpha / rank, so that another rank needs no other learning rate.
    targets: regular expressions; a weight is adapted where one is found in its path, such as
      "layers/attention/query/kernel" or "layers/moe/gate_up". The default leaves out the router,
      whose choices the experts have learned to expect, norms, embedding and head.
    share_experts: one pair (A, B) for all experts of a layer. By default each has its own: tokens
      of an expert are few of all, and a shared pair moves all experts alike; it has 1 / E of the
      parameters.

  Raises:
    ValueError: for a value outside its range, or an expression that is none.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = (
    r"attention/(query|key|value|out)/kernel",
    r"moe/(gate_up|down)$",
    r"(ffn|shared_expert)/(gate|up|down)/kernel",
  )
  share_experts: bool = False

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"rank is at least 1, got {self.rank}")
    if not 0 < self.alpha < math.inf:
      raise ValueError(f"alpha is positive and finite, got {self.alpha}")
    for target in self.targets:
      try:
        re.compile(target)
      except re.error as error:
        raise ValueError(f"targets: {target!r} is no regular expression: {error}") from None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


class Adapted(struct.PyTreeNode, nn.meta.AxisMetadata):
  """A weight and its adapter, in the place of the weight: whoever asks for it gets the sum.

  Linen unboxes what it is given as a parameter when a layer asks for it; here that is the sum.

  Attributes:
    base: [stacked..., inputs..., outputs...], not trained.
    a: [stacked..., inputs..., r]; without the axis of the experts where they share it.
    b: [stacked..., r, outputs...].
    scale: of the product.
    names: logical axes of `base`.
    inputs: how many axes are contracted.
  """

  base: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float = struct.field(pytree_node=False)
  names: tuple[str | None, ...] = struct.field(pytree_node=False)
  inputs: int = struct.field(pytree_node=False)

  def unbox(self) -> jax.Array:
    """base + scale * a b, summed in float32."""
    base = jax.lax.stop_gradient(self.base)
    names = self.names[-base.ndim :]  # the scan over layers has taken its axis away
    stacked = sum(name in _STACKED for name in names)
    outputs = base.ndim - stacked - self.inputs
    a, b = self.a, self.b
    if b.ndim - outputs - 1 < stacked:  # shared by the experts, whose axis is the last stacked one
      a, b = jnp.expand_dims(a, stacked - 1), jnp.expand_dims(b, stacked - 1)
    ins, outs = "ijkl"[: self.inputs], "wxyz"[:outputs]
    delta = jnp.einsum(
      f"...{ins}r,...r{outs}->...{ins}{outs}", a, b, preferred_element_type=jnp.float32
    )
    return constrain(base.astype(jnp.float32) + self.scale * delta, *names)

  def replace_boxed(self, val):
    raise NotImplementedError("an adapted weight is not assigned to")

  def add_axis(self, index, params):
    return self

  def remove_axis(self, index, params):
    return self


def init_adapters(model: ModelConfig, lora: LoraConfig, key: jax.Array):
  """Fresh adapters: A normal with the variance 1 / inputs, B zero, so that nothing changes yet.

  Args:
    model: whose weights they are for.
    lora: which.
    key: of A; another one for each path.

  Returns:
    A tree like the parameters', with {"a", "b"} for each target, float32, boxed with their logical
    axes: for `lladax.train.init_state` and `param_shardings`. `nn.meta.unbox` gives plain arrays.

  Raises:
    ValueError: for a target that no weight has, or a weight that is no matrix.
  """
  adapters: dict[str, Any] = {}
  unused = set(lora.targets)
  for path, leaf in _weights(model):
    found = {target for target in lora.targets if re.search(target, path)}
    unused -= found
    if found:
      pair = _init_pair(path, leaf, lora, jax.random.fold_in(key, zlib.crc32(path.encode())))
      _put(adapters, path.split("/"), pair)
  # Of the default targets some may be missing: few models have experts and dense layers.
  if not adapters or not unused <= set(LoraConfig.targets):
    paths = ", ".join(path for path, _ in _weights(model))
    raise ValueError(f"targets {sorted(unused)} are no weights of this model, which has {paths}")
  return adapters


def _weights(model: ModelConfig) -> list[tuple[str, Any]]:
  """(path, box of the abstract weight) of every parameter."""
  abstract = jax.eval_shape(lambda key: init_variables(model, key)["params"], jax.random.key(0))
  boxed = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
  leaves = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=boxed)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _init_pair(path: str, weight: nn.Partitioned, lora: LoraConfig, key: jax.Array):
  shape, names = weight.value.shape, weight.names
  stacked = sum(name in _STACKED for name in names)
  middle = stacked + _inputs(path)
  if middle >= len(shape):
    raise ValueError(f"targets: {path} {list(shape)} is no matrix, and has no use for an adapter")
  lead = [
    (size, name)
    for size, name in zip(shape[:stacked], names[:stacked], strict=True)
    if not (lora.share_experts and name in _EXPERTS)
  ]
  ins, outs = (
    list(zip(shape[part], names[part], strict=True))
    for part in (slice(stacked, middle), slice(middle, None))
  )
  rank = [(lora.rank, None)]
  fan_in = math.prod(size for size, _ in ins)

  def boxed(axes, value):
    sizes = tuple(size for size, _ in axes)
    return nn.LogicallyPartitioned(value(sizes), tuple(name for _, name in axes))

  return {
    "a": boxed(lead + ins + rank, lambda shape: jax.random.normal(key, shape) / math.sqrt(fan_in)),
    "b": boxed(lead + rank + outs, jnp.zeros),
  }


def attach(model: ModelConfig, lora: LoraConfig, base, adapters):
  """The parameters with adapters in their places, for whatever takes parameters.

  Args:
    base: the parameters, plain.
    adapters: of `init_adapters`, plain.
  """
  weights = {path: leaf.names for path, leaf in _weights(model)}

  def walk(base, adapters, path):
    if isinstance(base, Mapping):
      return {
        name: walk(entry, adapters[name], (*path, name)) if name in adapters else entry
        for name, entry in base.items()
      }
    joined = "/".join(path)
    names, inputs = tuple(weights[joined]), _inputs(joined)
    return Adapted(base, adapters["a"], adapters["b"], lora.scale, names, inputs)

  return walk(base, adapters, ())


def merge(model: ModelConfig, lora: LoraConfig, base, adapters):
  """Plain parameters in which the adapters are added up, in the dtype of `base`.

  Where that is bfloat16, the sum is rounded to it: small changes of a weight are lost. Keep `base`
  in float32 until it is saved.
  """
  merged = nn.meta.unbox(attach(model, lora, base, adapters))
  return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, base)


def make_lora_step(
  model: ModelConfig,
  lora: LoraConfig,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  **options: Any,
) -> Callable[[Any, TrainState, Any], tuple[TrainState, Any]]:
  """The jitted step `(base, state, batch) -> (state, metrics)`; `state.params` are the adapters.

  Args:
    model, objective, optimizer: as in `make_diffusion_step`.
    lora: which weights are adapted.
    **options: of `make_diffusion_step`.
  """

  def step(base, state: TrainState, batch):
    network = lambda adapters: attach(model, lora, base, adapters)  # noqa: E731
    return make_diffusion_step(model, objective, optimizer, network=network, **options)(
      state, batch
    )

  return jax.jit(step, donate_argnums=1)


def save_adapters(path: str | os.PathLike, lora: LoraConfig, adapters):
  """Writes adapters and their config as one safetensors file.

  Raises:
    ImportError: without safetensors.
  """
  from safetensors.flax import save_file

  leaves = jax.tree_util.tree_leaves_with_path(adapters)
  flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
  config = json.dumps(dataclasses.asdict(lora))
  save_file(flat, os.fspath(path), metadata={"lora": config})


def load_adapters(path: str | os.PathLike) -> tuple[LoraConfig, Any]:
  """What `save_adapters` wrote.

  Raises:
    ValueError: for a file of something else.
  """
  from safetensors import safe_open

  with safe_open(os.fspath(path), framework="flax") as file:
    metadata = file.metadata() or {}
    if "lora" not in metadata:
      raise ValueError(f"{path} has no adapters of ours: its metadata have no 'lora'")
    fields = json.loads(metadata["lora"])
    adapters: dict[str, Any] = {}
    for name in file.keys():
      _put(adapters, name.split("/"), file.get_tensor(name))
  return LoraConfig(**{**fields, "targets": tuple(fields["targets"])}), adapters


def _put(tree: dict[str, Any], path: list[str], value: Any):
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def _inputs(path: str) -> int:
  return next((n for end, n in _INPUTS.items() if path.endswith(end)), 1)
