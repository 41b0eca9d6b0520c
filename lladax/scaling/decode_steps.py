"""The programs of decoding, lowered for a slice: a pass over the whole canvas, and a block's step.

They are what `lladax.infer` runs: the model as `lladax.models.for_inference` makes it, a pass of its
`Denoiser` that keeps or reads keys and values, and the draw of a block's tokens.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from kernels_pallas import op
from lladax.infer.drawing import draw_tokens, remove_ids, token_probability
from lladax.models import (
  Denoiser,
  Memory,
  ModelConfig,
  inference_config,
  init_variables,
  quantize_params,
)
from lladax.models.cache import MEMORY_AXES
from lladax.models.layers import RotaryPositions
from lladax.moe.expert_parallel import specs_of
from lladax.scaling.active import Routed
from lladax.scaling.chips import Slice
from lladax.scaling.steps import Lowered, mesh_of, one_line
from lladax.sharding import MeshConfig, param_shardings, partition, use_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """A model as it decodes, described: nothing is allocated.

  Attributes:
    denoise: the network, its config that of `inference_config` on this mesh.
    mesh: of described devices.
    params: abstract parameters with shardings; experts perhaps `QuantizedExperts`.
    width: columns of a block.
  """

  denoise: Denoiser
  mesh: jax.sharding.Mesh
  params: object
  width: int

  @property
  def model(self) -> ModelConfig:
    return self.denoise.config

  def array(self, shape: tuple[int, ...], dtype, *names: str | None) -> jax.ShapeDtypeStruct:
    """An abstract array whose axes carry these logical names."""
    lies = jax.sharding.NamedSharding(self.mesh, partition(self.mesh, shape, names))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=lies)

  def memory(self, rows: int, length: int) -> Memory:
    """Abstract keys and values of a canvas, lying as `Denoiser.empty_memory` lays them."""
    shapes = jax.eval_shape(lambda: self.denoise.empty_memory(rows, length))
    return jax.tree.map(lambda x: self.array(x.shape, x.dtype, *MEMORY_AXES), shapes)

  def positions(self, rows: int, length: int) -> RotaryPositions:
    """As a loop of passes prepares them before it begins, by rows."""
    positions = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    shapes = jax.eval_shape(self.denoise.prepare, positions)
    return jax.tree.map(
      lambda x: self.array(x.shape, x.dtype, "batch", *[None] * (x.ndim - 1)), shapes
    )

  def routed(self, rows: int, size: int) -> Routed | None:
    """The experts of a pass over `size` columns of each row; None without experts."""
    if self.model.moe is None:
      return None
    return Routed.of(self.model.moe, self.mesh, self.params, rows=rows, tokens=rows * size)


def abstract_decoder(
  model: ModelConfig,
  mesh_config: MeshConfig,
  slice_: Slice,
  devices: list,
  *,
  width: int,
  block_causal: bool = False,
  weights: str | None = None,
) -> Decoder:
  """A model made ready for decoding on a slice.

  Args:
    model: as it is trained or loaded.
    width: columns of a block.
    block_causal: whether blocks see only what is before them.
    weights: of the experts, "int8" or "fp8"; None: in the dtype of computation.

  Raises:
    ConfigError: if the mesh does not fit, or there are no experts to quantise.
  """
  mesh = mesh_of(mesh_config, slice_, devices)
  with use_mesh(mesh):
    model = inference_config(model)
  # Outside `use_mesh`: what runs eagerly inside would be put on devices that are not here.
  boxed = jax.eval_shape(lambda key: init_variables(model, key)["params"], jax.random.key(0))
  params = nn.meta.unbox(boxed)
  if weights:
    with one_line():
      params = jax.eval_shape(lambda params: quantize_params(params, model, weights), params)

  def placed(sharding, leaf):
    def one(x, lies):
      lies = jax.sharding.NamedSharding(mesh, lies)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)

    return jax.tree.map(one, leaf, specs_of(leaf, sharding.spec))

  return Decoder(
    denoise=Denoiser(model, block_length=width if block_causal else None),
    mesh=mesh,
    params=jax.tree.map(placed, param_shardings(mesh, boxed), params),
    width=width,
  )


def lower_prefill(decoder: Decoder, *, rows: int, length: int) -> Lowered:
  """A pass over the whole canvas -> (tokens, probabilities, memory) of one block of each row."""
  ids, row = _canvas(decoder, rows, length)

  def step(params, tokens, positions, segment_ids, at):
    logits, memory = decoder.denoise.read(
      params, tokens, positions, segment_ids, at=at, width=decoder.width, keep=True
    )
    return *_draw(decoder, logits, at), memory

  lies = jax.tree.map(lambda x: x.sharding, decoder.memory(rows, length))
  jitted = jax.jit(step, out_shardings=(None, None, lies))
  return _lowered(
    decoder, jitted, (decoder.params, ids, decoder.positions(rows, length), ids, row), rows, length
  )


def lower_block_step(decoder: Decoder, *, rows: int, length: int) -> Lowered:
  """A pass over one block of each row -> its (tokens, probabilities), and the memory in place."""
  ids, row = _canvas(decoder, rows, length)
  behind = decoder.denoise.look_behind
  size = decoder.width + behind

  def step(params, memory, tokens, positions, segment_ids, at, active):
    start = at - behind
    logits, memory = decoder.denoise.read_window(
      params, tokens, positions, segment_ids, at=at, width=decoder.width, memory=memory,
      start=start, size=size, refresh=(start, start + size), rows=active,
    )  # fmt: skip
    return *_draw(decoder, logits, at), memory

  memory = decoder.memory(rows, length)
  # Laid out in HBM as the step wants it, as within the loop that a step is part of.
  lies = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), memory)
  jitted = jax.jit(
    step,
    in_shardings=(None, lies, *[None] * 5),
    out_shardings=(None, None, lies),
    donate_argnums=1,
  )
  active = decoder.array((rows,), jnp.bool_, "batch")
  args = decoder.params, memory, ids, decoder.positions(rows, length), ids, row, active
  return _lowered(decoder, jitted, args, rows, size)


def _canvas(decoder: Decoder, rows: int, length: int):
  """Ids of a canvas, and a column of each row."""
  return (
    decoder.array((rows, length), jnp.int32, "batch", None),
    decoder.array((rows,), jnp.int32, "batch"),
  )


def _draw(decoder: Decoder, logits, at):
  logits = remove_ids(logits, (decoder.model.mask_token_id,))
  columns = at[:, None] + jnp.arange(decoder.width)
  drawn = draw_tokens(logits, None, columns, temperature=0.0)
  return drawn, token_probability(logits, drawn)


def _lowered(decoder: Decoder, jitted, args: tuple, rows: int, size: int) -> Lowered:
  device = decoder.mesh.devices.flat[0]
  with use_mesh(decoder.mesh), op.target(device.device_kind), one_line():
    lowered = jitted.lower(*args)
  routed = decoder.routed(rows, size)
  return Lowered(
    lowered=lowered,
    mesh=decoder.mesh,
    params=decoder.params,
    optimizer=None,
    expected={},
    live={} if routed is None else routed.live(),
    tokens=rows * size,
  )
