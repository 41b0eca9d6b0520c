"""The real train step of an experiment, lowered for a slice."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import op
from lladax.config import ConfigError
from lladax.experiment import Experiment, train_step
from lladax.experiment.rates import supervised_share
from lladax.models import ModelConfig, init_variables
from lladax.scaling.chips import Slice
from lladax.scaling.cost import Live, Share
from lladax.scaling.hlo import Computation, Module, Shape
from lladax.scaling.mesh_rule import two_axes
from lladax.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from lladax.train import abstract_state, make_optimizer, state_shardings
from lladax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
  """A program before its compilation.

  Attributes:
    lowered: what `jax.jit(...).lower` returned.
    mesh: of described devices.
    params: abstract parameters with shardings.
    optimizer: abstract state of the optimizer, and counters; None for decoding.
    expected: how often loops run whose count is data, for `loops.visits`.
    live: the share of their stated cost that kernels are expected to do, for `cost.program_cost`.
    tokens: per device, all microbatches together; of decoding, the positions of all devices.
  """

  lowered: jax.stages.Lowered
  mesh: jax.sharding.Mesh
  params: object
  optimizer: object
  expected: dict[str, Callable[[Module, Computation], float]]
  live: Live
  tokens: float

  @property
  def mesh_sizes(self) -> dict[str, int]:
    return dict(self.mesh.shape)


def mesh_of(config: MeshConfig, slice_: Slice, devices: list) -> jax.sharding.Mesh:
  """The mesh on described devices.

  Raises:
    ConfigError: if it does not fit, with what fits.
  """
  try:
    return make_mesh(config, devices=devices)
  except (ValueError, NotImplementedError) as error:
    text = " ".join(str(error).split())
    if math.prod(config.sizes) != slice_.devices and -1 not in config.sizes:
      fitting = "; ".join(f"fsdp={fsdp},expert={expert}" for fsdp, expert in two_axes(slice_))
      text = (
        f"a mesh of {math.prod(config.sizes)} devices, and {slice_.name} has {slice_.devices}; "
      )
      text += f"of two axes these fit: {fitting}"
    raise ConfigError(text) from error


def lower_train_step(config: Experiment, slice_: Slice, devices: list) -> Lowered:
  """The train step of `lladax.experiment`, on abstract state and an abstract batch.

  Raises:
    ConfigError: if mesh, batch or model do not divide among the devices.
  """
  mesh = mesh_of(config.mesh, slice_, devices)
  check_divides(config, mesh)
  optimizer = make_optimizer(config.optimizer, config.steps)

  def init_params(key):
    return init_variables(config.model, key)["params"]

  # Outside `use_mesh`: what runs eagerly inside would be put on devices that are not here.
  state = abstract_state(init_params, optimizer, mesh)
  sharding = batch_sharding(mesh)
  shape = (config.data.batch_size, config.data.length)

  def array(dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  ids = array(jnp.int32)
  batch = Batch(tokens=ids, segment_ids=ids, positions=ids, maskable=array(jnp.bool_))
  with use_mesh(mesh), op.target(devices[0].device_kind), one_line():
    lowered = train_step(config, state_shardings(state)).lower(state, batch)
  tokens = math.prod(shape) / len(devices) * mesh.shape.get("tensor", 1)
  supervised = supervised_share(config)
  rows = tokens / config.microbatches / mesh.shape.get("tensor", 1) * supervised
  return Lowered(
    lowered=lowered,
    mesh=mesh,
    params=state.params,
    optimizer=dataclasses.replace(state, params=None),
    expected={"cross_entropy_blocks": _head_blocks(config.model, rows)},
    live={
      "cross_entropy_blocks": lambda shapes: Share(supervised, supervised),
      "layers/moe": _live_slots(config.model, tokens / config.microbatches),
    },
    tokens=tokens,
  )


def _head_blocks(model: ModelConfig, rows: float):
  """How often the head's loop runs: a device's supervised rows in blocks of those it multiplies."""

  def count(module: Module, body: Computation) -> float:
    blocks = [
      shape.size / model.vocab_size
      for name in _reached(module, body)
      for instruction in module.computations[name].instructions.values()
      if instruction.opcode in ("dot", "convolution")
      for shape in instruction.shapes
      if model.vocab_size in shape.dims and model.hidden_size not in shape.dims
    ]
    return math.ceil(rows / max(blocks)) if blocks else 1

  return count


def _live_slots(model: ModelConfig, tokens: float):
  """Of the rows of an exchange's buffer those that hold a token, were the experts in balance.

  A buffer for the worst case has more: all tokens may want the experts of one device.
  """

  def share(shapes: list[Shape]) -> Share:
    rows = max((shape.dims[0] for shape in shapes if len(shape.dims) > 1), default=0)
    slots = tokens * model.moe.num_experts_per_tok
    live = min(1.0, slots / rows) if rows > model.moe.num_experts else 1.0
    return Share(live, live)

  return share


def _reached(module: Module, computation: Computation) -> set[str]:
  found, new = set(), [computation.name]
  while new:
    name = new.pop()
    if name not in found and name in module.computations:
      found.add(name)
      for instruction in module.computations[name].instructions.values():
        new += [called for names in instruction.called.values() for called in names]
  return found


def check_divides(config: Experiment, mesh: jax.sharding.Mesh):
  """What the layers do not refuse by themselves.

  Raises:
    ConfigError: naming the size and what it must divide by.
  """
  sizes = dict(mesh.shape)
  rows = config.data.batch_size // config.microbatches
  shards = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert"))
  checks = [
    (rows, shards, "rows of a microbatch (data.batch_size / microbatches)", "data x fsdp x expert"),
    (config.data.length, sizes.get("context", 1), "data.length", "context"),
  ]
  for size, devices, what, axes in checks:
    if size % devices:
      least = "" if size > devices or "rows" not in what else f", at least {devices}"
      raise ConfigError(
        f"{what} = {size} does not divide by the {devices} devices of the mesh axis {axes}; "
        f"use a multiple of {devices}{least}, or another --mesh"
      )


@contextlib.contextmanager
def one_line():
  """What is wrong with a config and found while it is traced, as a `ConfigError`."""
  try:
    yield
  except ConfigError:
    raise
  except (ValueError, NotImplementedError) as error:
    raise ConfigError(" ".join(str(error).split())[:500]) from error
