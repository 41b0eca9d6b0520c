"""A plan: a compiled program, what it costs on a slice, and how that compares with the least."""

from __future__ import annotations

import dataclasses
import math
import time

import jax

from lladax.config import ConfigError
from lladax.experiment import Experiment
from lladax.experiment.rates import supervised_share, useful_flops
from lladax.models import ModelConfig
from lladax.scaling import aot, flops, hlo, steps
from lladax.scaling.chips import Slice
from lladax.scaling.collectives import Collective, Layout, find_collectives
from lladax.scaling.cost import Cost, program_cost
from lladax.scaling.least import Need, least_traffic
from lladax.scaling.loops import UnknownLoop, visits
from lladax.scaling.memory import Memory, Situation, shard_bytes
from lladax.scaling.roofline import Roofline, roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a program costs on a slice; numbers are per device and step.

  Attributes:
    cost, collectives, roofline: None where the program does not fit.
    least: what the mesh cannot do without; empty for decoding.
    useful_flops: by `lladax.scaling.flops`.
    tokens_per_step: of the whole slice.
    situation: what remedies depend on; None for decoding.
    text: of the compiled program.
    whole_slice: all-reduces over several axes of more than the replicated parameters: a gather or
      a scatter was meant.
  """

  slice_: Slice
  mesh_sizes: dict[str, int]
  exchange: str
  memory: Memory
  useful_flops: float
  tokens_per_step: float
  cost: Cost | None = None
  collectives: tuple[Collective, ...] = ()
  roofline: Roofline | None = None
  least: tuple[Need, ...] = ()
  whole_slice: tuple[Collective, ...] = ()
  unknown_loops: tuple[UnknownLoop, ...] = ()
  situation: Situation | None = None
  text: str = ""
  lower_seconds: float = 0.0
  compile_seconds: float = 0.0

  @property
  def tokens_per_device(self) -> float:
    return self.tokens_per_step / self.slice_.devices


def plan_training(config: Experiment, slice_: Slice) -> Plan:
  """Compiles the train step and reads its cost off the compiled program.

  Raises:
    ConfigError: for input that cannot be planned.
  """
  devices = aot.devices(slice_)
  started = time.monotonic()
  program = steps.lower_train_step(config, slice_, devices)
  lowered = time.monotonic()
  parameters, optimizer = shard_bytes(program.params), shard_bytes(program.optimizer)
  shared = {
    "slice_": slice_,
    "mesh_sizes": program.mesh_sizes,
    "exchange": exchange_name(config.model),
    "useful_flops": useful_flops(config) / slice_.devices,
    "tokens_per_step": config.data.batch_size * config.data.length,
    "least": tuple(
      least_traffic(
        config.model,
        program.params,
        program.mesh_sizes,
        program.tokens,
        microbatches=config.microbatches,
        supervised=supervised_share(config),
      )
    ),
  }
  compiled = None
  try:
    compiled = aot.compile_lowered(program.lowered)
    memory = memory_of(compiled, slice_, parameters, optimizer)
  except aot.DoesNotFit as error:
    batch = 13 * config.data.batch_size * config.data.length / slice_.devices
    memory = memory_refused(error, parameters, optimizer, batch)
  shared |= {
    "memory": memory,
    "situation": _situation(config, slice_, program, memory),
    "lower_seconds": lowered - started,
    "compile_seconds": time.monotonic() - lowered,
  }
  if compiled is None:
    return Plan(**shared)
  return read_costs(Plan(**shared), compiled.text, program)


def read_costs(plan: Plan, text: str, program: steps.Lowered) -> Plan:
  """The plan with FLOPs, traffic and time of the program's text."""
  module = hlo.parse(text)
  visited, unknown = visits(module, program.expected)
  cost = program_cost(module, visited, program.live)
  collectives = find_collectives(visited, Layout.of(program.mesh), plan.slice_)
  return dataclasses.replace(
    plan,
    text=text,
    cost=cost,
    collectives=tuple(sorted(collectives, key=lambda c: -c.total_seconds)),
    unknown_loops=tuple(unknown),
    whole_slice=tuple(_whole_slice(collectives, program.params)),
    roofline=roofline(
      plan.slice_.chip,
      flops=cost.flops,
      hbm_bytes=cost.hbm_bytes,
      link_seconds=sum(collective.total_seconds for collective in collectives),
      useful_flops=plan.useful_flops,
    ),
  )


def _whole_slice(collectives, params) -> list[Collective]:
  """All-reduces over several axes that are larger than the gradients that every device has whole."""
  whole = sum(
    4 * leaf.size for leaf in jax.tree.leaves(params) if leaf.sharding.is_fully_replicated
  )
  limit = max(2 * whole, 64 << 10)
  return [c for c in collectives if c.kind == "all-reduce" and len(c.axes) > 1 and c.size > limit]


def memory_of(
  compiled: aot.Compiled, slice_: Slice, parameters: float, optimizer: float = 0
) -> Memory:
  return Memory(
    parameters=parameters,
    optimizer=optimizer,
    batch=max(compiled.arguments - parameters - optimizer, 0),
    temporaries=compiled.temporaries + max(compiled.outputs - compiled.aliased, 0),
    code=compiled.code,
    peak=compiled.peak,
    needed=compiled.held,
    available=slice_.chip.hbm,
  )


def memory_refused(
  error: aot.DoesNotFit, parameters: float, optimizer: float = 0, batch: float = 0
) -> Memory:
  """What is known of a program that the compiler refused."""
  return Memory(
    parameters=parameters,
    optimizer=optimizer,
    batch=batch,
    temporaries=max(error.needed - parameters - optimizer - batch, 0.0),
    code=0,
    peak=error.needed,
    needed=max(error.needed, parameters + optimizer),
    available=error.available,
  )


def _situation(config: Experiment, slice_: Slice, program: steps.Lowered, memory: Memory):
  model, sizes = config.model, program.mesh_sizes
  item = jax.numpy.dtype(model.dtype).itemsize
  tokens = program.tokens / config.microbatches
  least = tokens * model.hidden_size * item * model.num_hidden_layers
  layer = flops.token_flops(model, config.data.length)
  # A product's result is kept for each of its inputs' gradients: roughly its operations over 2 D.
  kept = (layer.projections + layer.experts + layer.dense) / (2 * model.hidden_size) * tokens * item
  shards = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert"))
  return Situation(
    memory=memory,
    slice_=slice_,
    mesh_sizes=sizes,
    fixed=min(memory.parameters + _layer_bytes(model, program.params, item), memory.temporaries),
    saved=least if model.remat in ("full", "keep_nothing") else least + kept,
    saved_least=least,
    rows=config.data.batch_size / config.microbatches / shards,
    batch_size=config.data.batch_size,
    microbatches=config.microbatches,
    remat=model.remat,
  )


def _layer_bytes(model, params, item: int) -> float:
  """The largest stack of layers' weights, one layer of it, gathered."""
  stacked = params.get("layers") or params.get("dense_layers")
  if stacked is None or not hasattr(params, "get"):
    return 0.0
  count = model.num_routed_layers or model.num_dense_layers
  return sum(leaf.size for leaf in jax.tree.leaves(stacked)) / count * item


def exchange_name(model: ModelConfig) -> str:
  return "none" if model.moe is None else type(model.moe.exchange).__name__


def fit_microbatches(config: Experiment, slice_: Slice, report=lambda text: None) -> tuple:
  """(config, plan) with the fewest microbatches, in powers of two, at which the step fits.

  If it never fits, those of the last attempt. Attempts that an estimate from the last one rules out
  are not compiled.
  """
  while True:
    plan = plan_training(config, slice_)
    if plan.memory.fits:
      return config, plan
    parts = 2
    while plan.situation.needed_in_parts(parts) > plan.memory.available and parts < 64:
      parts *= 2
    try:
      candidate = dataclasses.replace(config, microbatches=config.microbatches * parts)
      steps.check_divides(candidate, steps.mesh_of(config.mesh, slice_, aot.devices(slice_)))
    except (ConfigError, ValueError):
      return config, plan
    report(f"{config.microbatches} microbatches do not fit; trying {candidate.microbatches}")
    config = candidate
