"""Planning of decoding: one pass over the whole row (prefill), and one step of a block.

A block's step computes the tokens of the block alone; keys and values of the rest are read from a
cache. The block's program is compiled without the cache, whose memory and attention are added by
arithmetic.
"""

from __future__ import annotations

import dataclasses

from lladax.experiment import Experiment
from lladax.scaling import aot, flops, steps
from lladax.scaling.chips import GIB, Slice
from lladax.scaling.memory import Memory, shard_bytes
from lladax.scaling.plan import Plan, exchange_name, read_costs
from lladax.scaling.report import mesh_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan:
  """One program of decoding.

  Attributes:
    name: "prefill" or "block step".
    batch: rows.
    width: positions computed in each row.
    plan: of the compiled program; tokens are positions.
    cache_bytes: keys and values of all rows, per device, that a step reads; 0 for prefill.
    cache_flops: of attention to them, per device.
  """

  name: str
  batch: int
  width: int
  plan: Plan
  cache_bytes: float
  cache_flops: float

  @property
  def seconds(self) -> tuple[float, float]:
    """All overlapped, and nothing overlapped."""
    roof, chip = self.plan.roofline, self.plan.slice_.chip
    hbm = roof.hbm + self.cache_bytes / chip.hbm_bandwidth
    compute = roof.compute + self.cache_flops / chip.flops
    return max(compute, hbm, roof.links), compute + hbm + roof.links


def plan_decoding(
  config: Experiment, slice_: Slice, *, batches: tuple[int, ...], prompt: int, report=lambda t: None
) -> list[DecodePlan]:
  """Prefill and block step for each number of rows, parameters in the compute dtype.

  Raises:
    ConfigError: for input that cannot be planned.
  """
  model = dataclasses.replace(config.model, param_dtype=config.model.dtype, remat="none")
  length = prompt + config.sampler.gen_length
  devices, found = aot.devices(slice_), []
  for batch in batches:
    for name, width in (("prefill", length), ("block step", config.sampler.block_length)):
      report(f"{name}, {batch} rows")
      plan = _plan(config, model, slice_, devices, batch, width, config.sampler.block_length)
      cached = 0 if name == "prefill" else length - width
      # Keys and values are split over the devices that hold their heads or their rows.
      split = plan.slice_.devices if batch % slice_.devices == 0 else plan.mesh_sizes["tensor"]
      item, heads = 2, 2 * model.kv_heads * model.head_size * model.num_hidden_layers
      scores = 4 * model.num_attention_heads * model.head_size * model.num_hidden_layers
      found.append(
        DecodePlan(
          name=name,
          batch=batch,
          width=width,
          plan=plan,
          cache_bytes=batch * cached * heads * item / split,
          cache_flops=batch * width * cached * scores / split,
        )
      )
  return found


def _plan(config, model, slice_, devices, batch, length, width) -> Plan:
  program = steps.lower_forward(
    model, config.mesh, slice_, devices, batch=batch, length=length, width=width
  )
  parameters = shard_bytes(program.params)
  useful = flops.token_flops(model, length, supervised=width / length).total * batch * length
  shared = {
    "slice_": slice_,
    "mesh_sizes": program.mesh_sizes,
    "exchange": exchange_name(config),
    "useful_flops": useful / slice_.devices,
    "tokens_per_step": batch * length,
  }
  try:
    compiled = aot.compile_lowered(program.lowered)
  except aot.DoesNotFit as error:
    memory = Memory(
      parameters=parameters, optimizer=0, batch=0, temporaries=error.needed - parameters, code=0,
      peak=error.needed, needed=error.needed, available=error.available,
    )  # fmt: skip
    return Plan(memory=memory, **shared)
  memory = Memory(
    parameters=parameters,
    optimizer=0,
    batch=compiled.arguments - parameters,
    temporaries=compiled.temporaries + compiled.outputs,
    code=compiled.code,
    peak=compiled.peak,
    needed=compiled.held,
    available=slice_.chip.hbm,
  )
  return read_costs(Plan(memory=memory, **shared), compiled.text, program)


def text(plans: list[DecodePlan], config: Experiment) -> str:
  """A table of passes, and what they are worth in tokens per second."""
  first = plans[0].plan
  lines = [
    f"decoding on {first.slice_.name}: mesh {mesh_text(first.mesh_sizes)}, exchange "
    f"{first.exchange}; blocks of {config.sampler.block_length}, "
    f"{config.sampler.gen_length} tokens to write",
    f"{'pass':11} {'rows':>5} {'width':>6} {'GiB':>7} {'cache':>7} {'HBM ms':>8} {'links ms':>9} "
    f"{'compute ms':>11} {'pass ms':>15} {'passes/s':>14}",
  ]
  for each in plans:
    memory = each.plan.memory
    needed = (memory.needed + each.cache_bytes) / GIB
    start = f"{each.name:11} {each.batch:5} {each.width:6} {needed:7.2f} "
    if each.plan.roofline is None:
      lines.append(start + f"does not fit: {memory.available / GIB:.2f} GiB there")
      continue
    roof, (low, high) = each.plan.roofline, each.seconds
    lines.append(
      start + f"{each.cache_bytes / GIB:7.3f} {roof.hbm * 1e3:8.2f} {roof.links * 1e3:9.2f} "
      f"{roof.compute * 1e3:11.2f} {low * 1e3:6.2f} to {high * 1e3:5.2f} "
      f"{1 / high:5.0f} to {1 / low:5.0f}"
    )
  lines.append(
    "Tokens per second = passes per second x rows x tokens written per pass (1 without parallel "
    "unmasking). Times are arithmetic on compiled programs, as for training; cached keys and values "
    "(column cache, GiB) are arithmetic alone."
  )
  return "\n".join(lines)


def to_dict(plans: list[DecodePlan]) -> list[dict]:
  from lladax.scaling.report import to_dict as plan_to_dict

  return [
    {
      "pass": each.name,
      "rows": each.batch,
      "width": each.width,
      "cache_bytes": each.cache_bytes,
      "cache_flops": each.cache_flops,
      "seconds": None if each.plan.roofline is None else each.seconds,
      "program": plan_to_dict(each.plan),
    }
    for each in plans
  ]
