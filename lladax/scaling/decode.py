"""Planning of decoding: a pass over the whole canvas (prefill), and a step of one block of each row.

Both are compiled as they run (`lladax.scaling.decode_steps`), and all but the floor is read off the
compiled programs.
"""

from __future__ import annotations

import dataclasses
import time

from lladax.config import ConfigError
from lladax.experiment import Experiment
from lladax.infer import BlockCausal
from lladax.scaling import aot, flops
from lladax.scaling.active import needed_bytes
from lladax.scaling.chips import GIB, Slice
from lladax.scaling.decode_steps import Decoder, abstract_decoder, lower_block_step, lower_prefill
from lladax.scaling.memory import shard_bytes
from lladax.scaling.plan import Plan, exchange_name, memory_of, memory_refused, read_costs
from lladax.scaling.report import mesh_text
from lladax.scaling.report import to_dict as plan_to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan:
  """One program of decoding; numbers are per device.

  Attributes:
    name: "prefill" or "block step".
    rows: of the canvas.
    width: columns computed in each row.
    plan: of the compiled program; tokens are positions.
    memory_bytes: keys and values, which prefill returns and a block's step reads and updates.
    needed_bytes: what has to be moved between HBM and chip in any case.
  """

  name: str
  rows: int
  width: int
  plan: Plan
  memory_bytes: float
  needed_bytes: float

  @property
  def floor(self) -> float:
    """Seconds that the needed bytes take."""
    return self.needed_bytes / self.plan.slice_.chip.hbm_bandwidth

  @property
  def seconds(self) -> tuple[float, float] | None:
    """All overlapped, and nothing overlapped; None if it does not fit."""
    roof = self.plan.roofline
    return None if roof is None else (roof.overlapped, roof.serial)


def plan_decoding(
  config: Experiment,
  slice_: Slice,
  *,
  rows: tuple[int, ...],
  prompt: int,
  weights: str | None = None,
  report=lambda text: None,
) -> list[DecodePlan]:
  """Prefill and a block's step for each number of rows.

  Args:
    config: whose model decodes, by its sampler, on its mesh.
    rows: numbers of them.
    prompt: tokens before what is written.
    weights: of the experts, "int8" or "fp8"; None: in the dtype of computation.

  Raises:
    ConfigError: for input that cannot be planned.
  """
  sampler = config.sampler
  if min(rows) < 1 or prompt < 0:
    raise ConfigError(f"there is at least one row, and a prompt of at least 0 tokens; got {rows} "
                      f"and {prompt}")  # fmt: skip
  decoder = abstract_decoder(
    config.model,
    config.mesh,
    slice_,
    aot.devices(slice_),
    width=sampler.block_length,
    block_causal=isinstance(sampler.cache, BlockCausal),
    weights=weights,
  )
  found = []
  for number in rows:
    for name in ("prefill", "block step"):
      report(f"{name}, {number} rows")
      found.append(_plan(decoder, slice_, name, number, prompt + sampler.gen_length))
  return found


def _plan(decoder: Decoder, slice_: Slice, name: str, rows: int, length: int) -> DecodePlan:
  lower = lower_prefill if name == "prefill" else lower_block_step
  started = time.monotonic()
  program = lower(decoder, rows=rows, length=length)
  lowered = time.monotonic()
  size = program.tokens // rows
  model, parameters = decoder.model, shard_bytes(program.params)
  memory_bytes = shard_bytes(decoder.memory(rows, length))
  useful = flops.pass_flops(model, size, keys=length, wanted=decoder.width)
  shared = {
    "slice_": slice_,
    "mesh_sizes": program.mesh_sizes,
    "exchange": exchange_name(model),
    "useful_flops": useful * rows / slice_.devices,
    "tokens_per_step": program.tokens,
  }
  try:
    compiled = aot.compile_lowered(program.lowered)
  except aot.DoesNotFit as error:
    plan = Plan(memory=memory_refused(error, parameters), **shared)
  else:
    shared |= {
      "lower_seconds": lowered - started,
      "compile_seconds": time.monotonic() - lowered,
    }
    plan = Plan(memory=memory_of(compiled, slice_, parameters), **shared)
    plan = read_costs(plan, compiled.text, program)
  return DecodePlan(
    name=name,
    rows=rows,
    width=size,
    plan=plan,
    memory_bytes=memory_bytes,
    needed_bytes=needed_bytes(
      program.params, memory_bytes, decoder.routed(rows, size), tied=model.tie_word_embeddings
    ),
  )


HEADINGS = ("pass", "rows", "width", "GiB", "memory GiB", "floor ms", "HBM ms", "links ms",
            "compute ms", "pass ms", "x floor", "passes/s")  # fmt: skip
WIDTHS = (10, 4, 5, 6, 10, 8, 7, 8, 10, 14, 12, 12)


def text(plans: list[DecodePlan], config: Experiment) -> str:
  """A table of passes, and what they are worth in tokens per second."""
  first, sampler = plans[0].plan, config.sampler
  lines = [
    f"decoding on {first.slice_.name}: mesh {mesh_text(first.mesh_sizes)}, exchange "
    f"{first.exchange}; blocks of {sampler.block_length}, {sampler.gen_length} tokens to write",
    *(" ".join(f"{cell:>{width}}" for cell, width in zip(line, WIDTHS, strict=True))
      for line in (HEADINGS, *map(row, plans))),
    "Per device. Tokens per second = passes per second x rows x tokens written per pass (1 without "
    "parallel unmasking). Memory: keys and values, of which GiB is the whole program with them. "
    "Floor: the weights that lie on a device (of the experts those that some token is expected to "
    "choose) and the memory, once at the published bandwidth. Times are arithmetic on compiled "
    "programs, as for training.",
  ]  # fmt: skip
  return "\n".join(lines)


def row(each: DecodePlan) -> tuple[str, ...]:
  """One line of the table."""
  needed, roof = each.plan.memory.needed, each.plan.roofline
  start = (each.name, str(each.rows), str(each.width), f"{needed / GIB:.2f}",
           f"{each.memory_bytes / GIB:.3f}", f"{each.floor * 1e3:.2f}")  # fmt: skip
  if roof is None:
    return (*start, *["-"] * 5, f"does not fit {each.plan.memory.available / GIB:.2f} GiB")
  low, high = each.seconds
  return (
    *start,
    *(f"{seconds * 1e3:.2f}" for seconds in (roof.hbm, roof.links, roof.compute)),
    f"{low * 1e3:.2f} to {high * 1e3:.2f}",
    f"{low / each.floor:.2f} to {high / each.floor:.2f}",
    f"{1 / high:.0f} to {1 / low:.0f}",
  )


def to_dict(plans: list[DecodePlan]) -> list[dict]:
  """The plans as JSON values."""
  return [
    {
      "pass": each.name,
      "rows": each.rows,
      "width": each.width,
      "memory_bytes": each.memory_bytes,
      "needed_bytes": each.needed_bytes,
      "floor_seconds": each.floor,
      "seconds": each.seconds,
      "program": plan_to_dict(each.plan),
    }
    for each in plans
  ]
