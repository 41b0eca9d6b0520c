"""A plan as text for people, as JSON for programs, and as a row of a table."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections import defaultdict

from lladax.scaling.chips import GIB
from lladax.scaling.collectives import Collective
from lladax.scaling.memory import describe_remedies
from lladax.scaling.plan import Plan
from lladax.scaling.roofline import days

ASSUMPTIONS = (
  "Time is arithmetic, not a measurement: peaks of compute, HBM and links as published "
  "(links as measured by others); the first bound overlaps all three perfectly, the second nothing. "
  "Kernels below their peak make a real step slower. Routers are taken to be in balance."
)


def text(plan: Plan, *, tokens: float | None = None, title: str = "") -> str:
  """All of a plan in some forty lines."""
  blocks = [_head(plan, title), _memory(plan)]
  if plan.cost is not None:
    blocks += [_flops(plan), _collectives(plan), _time(plan, tokens)]
  return "\n\n".join("\n".join(block) for block in blocks)


def _head(plan: Plan, title: str) -> list[str]:
  chip, axes = plan.slice_.chip, mesh_text(plan.mesh_sizes)
  per_device = plan.tokens_per_device
  return [
    f"{title or 'plan'} on {plan.slice_.name}: {plan.slice_.devices} devices, mesh {axes}, "
    f"exchange {plan.exchange}",
    f"{plan.tokens_per_step:,.0f} tokens per step, {per_device:,.0f} per device; "
    f"jax {importlib.metadata.version('jax')}, libtpu {importlib.metadata.version('libtpu')}; "
    f"lowered in {plan.lower_seconds:.0f} s, compiled in {plan.compile_seconds:.0f} s",
    f"a device: {chip.flops / 1e12:.0f} TFLOP/s, {chip.hbm / GIB:.2f} GiB of HBM for a program, "
    f"{chip.hbm_bandwidth / 1e9:.0f} GB/s, {chip.links} links of {chip.link / 1e9:.0f} GB/s",
  ]


def _memory(plan: Plan) -> list[str]:
  memory = plan.memory
  scale, unit = _bytes_unit(memory.needed)
  lines = [f"Memory per device, {unit}"]
  for name in ("parameters", "optimizer", "batch", "temporaries", "code"):
    lines.append(f"  {name:12} {getattr(memory, name) / scale:8.2f}")
  share = memory.needed / memory.available
  lines.append(
    f"  {'needed':12} {memory.needed / scale:8.2f} of {memory.available / scale:.2f} ({share:.0%}); "
    f"at most {memory.peak / scale:.2f} alive at a time"
  )
  if not memory.fits and plan.situation is not None:
    lines += describe_remedies(plan.situation)
  return lines


def _bytes_unit(size: float) -> tuple[float, str]:
  return (GIB, "GiB") if size > 0.1 * GIB else (1 << 20, "MiB")


def _flops_unit(count: float) -> tuple[float, str]:
  return (1e12, "TFLOP") if count > 0.1e12 else (1e9, "GFLOP")


def _flops(plan: Plan) -> list[str]:
  compiled, useful = plan.cost.flops, plan.useful_flops
  scale, unit = _flops_unit(useful)
  lines = [
    f"Matrix products per device and step, {unit}",
    f"  useful       {useful / scale:8.3f}  (forward and backward; the head on supervised tokens)",
    f"  compiled     {compiled / scale:8.3f}  ({compiled / useful:.2f} times the useful ones; "
    f"{recomputed(plan) / scale:.3f} in recomputation)",
  ]
  if plan.cost.unknown_calls:
    calls = ", ".join(f"{name} x {n:.0f}" for name, n in plan.cost.unknown_calls.items())
    lines.append(f"  not counted, kernels that state no cost: {calls}")
  for loop in plan.unknown_loops:
    lines.append(f"  counted once, a loop whose count is data: {short(loop.op_name) or loop.name}")
  scale, unit = _bytes_unit(plan.cost.hbm_bytes)
  total = plan.cost.hbm_bytes / scale
  lines.append(f"HBM traffic per device and step: {total:.2f} {unit}, most of it in")
  for name, size in list(plan.cost.bytes_by_scope.items())[:6]:
    lines.append(f"  {size / scale:9.2f}  {short(name)}")
  return lines


# Parts of JAX's names that say nothing about the model.
NOISE = re.compile(r"(jit\(train_step\)|while|body|eval_jaxpr|shard_map|cond|branch_\d+_fun|closed_call)"
                   r"(/|$)")  # fmt: skip


def short(op_name: str) -> str:
  """JAX's name of an operation without what loops and maps add to it."""
  return NOISE.sub("", op_name).replace("Transformer.", "")[-90:] or "(the compiler's own)"


def recomputed(plan: Plan) -> float:
  """FLOPs of what is computed a second time for the backward pass."""
  scopes = plan.cost.flops_by_scope.items()
  return sum(count for name, count in scopes if "rematted_computation" in name)


def _collectives(plan: Plan) -> list[str]:
  moved = sum(c.total_bytes for c in plan.collectives)
  least = sum(need.bytes for need in plan.least)
  scale, unit = _bytes_unit(moved)
  lines = [
    "Collectives per device and step",
    f"  {'kind':20} {'axes':18} {'runs':>6} {unit:>9} {'ms':>8}",
  ]
  for (kind, axes), (runs, size, seconds) in grouped(plan.collectives).items():
    lines.append(
      f"  {kind:20} {'+'.join(axes):18} {runs:6.0f} {size / scale:9.3f} {seconds * 1e3:8.2f}"
    )
  if plan.least:
    ratio = moved / least if least else float("inf")
    lines.append(
      f"  received {moved / scale:.3f} {unit}; the least for this mesh is {least / scale:.3f} "
      f"({ratio:.2f} times):"
    )
    for need in sorted(plan.least, key=lambda need: -need.bytes):
      if need.bytes > 0.005 * least:
        lines.append(
          f"    {need.purpose:24} {need.kind:18} {'+'.join(need.axes):18} {need.bytes / scale:9.3f}"
        )
  for collective in scatters_as_all_reduces(plan):
    lines.append(
      f"  all-reduce over {'+'.join(collective.axes)}, twice the bytes of the scatter that was meant: "
      f"{collective.size / scale:.3f} {unit} x {collective.times:.0f}, {short(collective.op_name)}"
    )
  for collective in plan.whole_slice:
    lines.append(
      "  whole-slice all-reduce where a gather or scatter was meant: "
      f"{collective.size / scale:.3f} {unit} x {collective.times:.0f}, {short(collective.op_name)}"
    )
  return lines


def scatters_as_all_reduces(plan: Plan) -> list[Collective]:
  """Large all-reduces over one axis of more bytes than this mesh needs to all-reduce over it."""
  found = []
  for collective in plan.collectives:
    needs = [n for n in plan.least if n.kind == "all-reduce" and n.axes == collective.axes]
    large = collective.size > (1 << 20) and collective.axes in (("fsdp",), ("expert",))
    if collective.kind == "all-reduce" and large:
      if collective.total_bytes > sum(need.bytes for need in needs):
        found.append(collective)
  return found


def grouped(collectives: tuple[Collective, ...]) -> dict:
  """(kind, axes) -> (runs, bytes, seconds), the longest first."""
  groups: dict = defaultdict(lambda: (0.0, 0.0, 0.0))
  for c in collectives:
    runs, size, seconds = groups[c.kind, c.axes]
    groups[c.kind, c.axes] = (runs + c.times, size + c.total_bytes, seconds + c.total_seconds)
  return dict(sorted(groups.items(), key=lambda item: -item[1][2]))


def _time(plan: Plan, tokens: float | None) -> list[str]:
  roof = plan.roofline
  lines = [
    f"Time per step, ms: compute {roof.compute * 1e3:.1f}, HBM {roof.hbm * 1e3:.1f}, "
    f"links {roof.links * 1e3:.1f}; bound by {roof.bound_by}"
  ]
  for name, seconds in (("all overlapped", roof.overlapped), ("nothing overlapped", roof.serial)):
    per_day = plan.tokens_per_step / seconds * 86_400
    line = (
      f"  {name:18} {seconds * 1e3:9.1f} ms, MFU {roof.mfu(seconds):.1%}, "
      f"{plan.tokens_per_step / seconds / plan.slice_.devices:,.0f} tokens/s per device, "
      f"{per_day / 1e9:.1f}e9 tokens a day"
    )
    if tokens:
      line += f", {tokens:.3g} tokens in {days(tokens, plan.tokens_per_step, seconds):,.0f} days"
    lines.append(line)
  return [*lines, ASSUMPTIONS]


def mesh_text(sizes: dict[str, int]) -> str:
  return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def to_dict(plan: Plan, *, tokens: float | None = None) -> dict:
  """The plan as JSON values."""
  found = {
    "topology": plan.slice_.name,
    "devices": plan.slice_.devices,
    "mesh": plan.mesh_sizes,
    "exchange": plan.exchange,
    "tokens_per_step": plan.tokens_per_step,
    "jax": importlib.metadata.version("jax"),
    "libtpu": importlib.metadata.version("libtpu"),
    "lower_seconds": plan.lower_seconds,
    "compile_seconds": plan.compile_seconds,
    "memory_bytes": dataclasses.asdict(plan.memory) | {"fits": plan.memory.fits},
    "useful_flops": plan.useful_flops,
    "least_traffic": [dataclasses.asdict(need) for need in plan.least],
  }
  if plan.cost is None:
    return found
  roof = plan.roofline
  bounds = {"overlapped": roof.overlapped, "serial": roof.serial}
  return found | {
    "compiled_flops": plan.cost.flops,
    "flops_by_scope": plan.cost.flops_by_scope,
    "hbm_bytes": plan.cost.hbm_bytes,
    "hbm_bytes_by_scope": plan.cost.bytes_by_scope,
    "kernels_without_cost": plan.cost.unknown_calls,
    "loops_counted_once": [dataclasses.asdict(loop) for loop in plan.unknown_loops],
    "collectives": [dataclasses.asdict(c) for c in plan.collectives],
    "whole_slice_all_reduces": [dataclasses.asdict(c) for c in plan.whole_slice],
    "seconds": {"compute": roof.compute, "hbm": roof.hbm, "links": roof.links} | bounds,
    "mfu": {name: roof.mfu(seconds) for name, seconds in bounds.items()},
    "tokens_per_day": {name: plan.tokens_per_step / s * 86_400 for name, s in bounds.items()},
    "days": tokens and {n: days(tokens, plan.tokens_per_step, s) for n, s in bounds.items()},
    "assumptions": ASSUMPTIONS,
  }


# --- A table ---

HEADINGS = (
  "experiment", "slice", "mesh", "exchange", "tokens per chip", "GiB per chip", "compiled / useful",
  "received / least GiB", "compute, HBM, links ms", "MFU between", "tokens/day",
)  # fmt: skip


def row(name: str, plan: Plan, microbatches: int) -> tuple[str, ...]:
  """One line of the table of `--table`."""
  per_chip = plan.tokens_per_device * plan.slice_.chip.devices_per_chip
  tokens = f"{per_chip:,.0f}"
  if microbatches > 1:
    tokens += f" in {microbatches}"
  memory = plan.memory
  held = f"{memory.needed / GIB:.1f} of {memory.available / GIB:.1f}"
  start = (name, plan.slice_.name, mesh_text(plan.mesh_sizes), plan.exchange, tokens)
  if plan.cost is None:
    return (*start, f"{held}: does not fit", *["-"] * 5)
  roof = plan.roofline
  moved = sum(c.total_bytes for c in plan.collectives)
  least = sum(need.bytes for need in plan.least)
  per_day = [plan.tokens_per_step / s * 86_400 / 1e9 for s in (roof.serial, roof.overlapped)]
  return (
    *start,
    held,
    f"{plan.cost.flops / plan.useful_flops:.2f}",
    f"{moved / GIB:.1f} / {least / GIB:.1f}",
    f"{roof.compute * 1e3:.0f}, {roof.hbm * 1e3:.0f}, {roof.links * 1e3:.0f}",
    f"{roof.mfu(roof.serial):.0%} and {roof.mfu(roof.overlapped):.0%}",
    f"{per_day[0]:.1f}e9 to {per_day[1]:.1f}e9",
  )


def markdown(rows: list[tuple[str, ...]]) -> str:
  lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
