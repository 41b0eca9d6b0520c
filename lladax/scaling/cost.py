"""Floating-point operations of matrix products, and bytes to and from HBM, of a compiled program.

Both are counted per chip and with every loop's trip count. Operations other than matrix products
are left out, as in every published MFU.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping

from lladax.scaling.hlo import HBM, Computation, Instruction, Module, Shape
from lladax.scaling.loops import Visit

# What names memory but moves nothing, or whose traffic is counted where it starts.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
        "call", "async-start", "after-all", "partition-id", "replica-id", "iota", "add-dependency",
        "opt-barrier", "optimization-barrier", "domain")  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Cost:
  """Per chip and step.

  Attributes:
    flops: of matrix products, two per multiply-and-add.
    hbm_bytes: read and written, tiles' padding left out. An upper bound where a fused kernel reads
      only a part of an operand in a way that is not a slice.
    flops_by_scope: by the name that JAX gave the product.
    bytes_by_scope: likewise of HBM traffic.
    unknown_calls: custom calls without a cost estimate -> how often they run; they count 0 FLOPs.
  """

  flops: float
  hbm_bytes: float
  flops_by_scope: dict[str, float]
  bytes_by_scope: dict[str, float]
  unknown_calls: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Share:
  """Of the cost that a kernel states, the share that is expected."""

  flops: float = 1.0
  hbm: float = 1.0


# A scope's name -> (shapes of a kernel's operands) -> the share of its stated cost that is expected.
# Kernels state the most that they may do; how much is live is data. The first scope counts.
Live = Mapping[str, Callable[[list[Shape]], Share]]


def program_cost(module: Module, visits: list[Visit], live: Live | None = None) -> Cost:
  flops, traffic, unknown = Counter(), Counter(), Counter()
  for visit in visits:
    for instruction in visit.computation.instructions.values():
      count = instruction_flops(visit.computation, instruction)
      share = _share(visit.computation, instruction, live or {})
      if count is None:
        unknown[re.sub(r"[.\d]+$", "", instruction.name)] += visit.times
      elif count:
        flops[instruction.op_name] += visit.times * share.flops * count
      if not visit.fused:
        moved = instruction_bytes(module, visit.computation, instruction)
        if moved:
          traffic[instruction.op_name] += visit.times * share.hbm * moved
  return Cost(
    flops=sum(flops.values()),
    hbm_bytes=sum(traffic.values()),
    flops_by_scope=dict(flops.most_common()),
    bytes_by_scope=dict(traffic.most_common()),
    unknown_calls=dict(unknown),
  )


def _share(computation: Computation, instruction: Instruction, live: Live) -> Share:
  if instruction.opcode != "custom-call":
    return Share()
  for scope, share in live.items():
    if scope in instruction.op_name:
      return share(_shapes(computation, instruction))
  return Share()


# --- FLOPs ---


def instruction_flops(computation: Computation, instruction: Instruction) -> float | None:
  """0 for what is no matrix product; None for a kernel that does not say."""
  if instruction.opcode == "dot":
    return _dot_flops(computation, instruction)
  if instruction.opcode == "convolution":
    return _convolution_flops(computation, instruction)
  if instruction.opcode == "custom-call":
    return _call_flops(computation, instruction)
  return 0.0


def _shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
  known = computation.instructions
  return [known[name].shape for name in instruction.operands if name in known]


def _dot_flops(computation, instruction) -> float:
  left = _shapes(computation, instruction)[0]
  contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
  return 2.0 * instruction.shape.size * math.prod(left.dims[dim] for dim in contracted)


def _convolution_flops(computation, instruction) -> float:
  """Multiplications with what is really there: not with padding or the holes of a dilation.

  XLA for TPU writes every matrix product as a convolution, a batched one as a dilated one whose
  window meets one element at a time.
  """
  left, right = _shapes(computation, instruction)[:2]
  inputs, kernels, outputs = instruction.attribute("dim_labels").replace("->", "_").split("_")
  window = _window(instruction, sum(char.isdigit() for char in inputs))
  places = 1
  for dim, (size, stride, low, lhs_dilate, rhs_dilate) in enumerate(window):
    places *= _meetings(
      left.dims[inputs.index(str(dim))],
      instruction.shape.dims[outputs.index(str(dim))],
      size, stride, low, lhs_dilate, rhs_dilate,
    )  # fmt: skip
  features = right.dims[kernels.index("i")]  # already divided by feature_group_count
  out = instruction.shape.dims[outputs.index("b")] * instruction.shape.dims[outputs.index("f")]
  groups = int(instruction.attribute("batch_group_count") or 1)
  return 2.0 * features * out * places / groups


def _window(instruction, dims: int):
  """(size, stride, padding before, dilation of the input, of the kernel) by spatial dimension."""
  given = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window") or ""))

  def values(name, default):
    return given[name].split("x") if name in given else [default] * dims

  names = (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
  return [
    tuple(int(value.split("_")[0]) for value in dim)
    for dim in zip(*(values(name, default) for name, default in names), strict=True)
  ]


def _meetings(inputs, outputs, size, stride, low, lhs_dilate, rhs_dilate) -> int:
  """Pairs (output place, window place) that meet an element of the input."""
  if size == 1 and low == 0 and lhs_dilate == 1:
    return outputs
  last = (inputs - 1) * lhs_dilate
  count = 0
  for out in range(outputs):
    for place in range(size):
      at = out * stride - low + place * rhs_dilate
      count += 0 <= at <= last and at % lhs_dilate == 0
  return count


def _call_flops(computation, instruction) -> float | None:
  target = (instruction.attribute("custom_call_target") or "").strip('"')
  if target != "tpu_custom_call":
    return 0.0
  if instruction.op_name.endswith(("ragged-dot-metadata", "ragged_dot_metadata")):
    return 0.0
  estimate = re.search(r'"flops":"?(\d+)"?', instruction.attributes)
  if estimate:
    return float(estimate[1])
  if "ragged-dot" in instruction.name:
    return _ragged_dot_flops(computation, instruction)
  if "splash" in instruction.name:
    return _splash_flops(computation, instruction)
  return None


def _ragged_dot_flops(computation, instruction) -> float:
  """XLA's own grouped product: 2 M K N whichever of the three arrays is the result."""
  arrays = [s for s in (*_shapes(computation, instruction), instruction.shape) if len(s.dims) > 1]
  weights = next(shape for shape in arrays if len(shape.dims) == 3)
  rows = next(shape for shape in arrays if len(shape.dims) == 2)
  return 2.0 * rows.dims[0] * weights.dims[-1] * weights.dims[-2]


def _splash_flops(computation, instruction) -> float | None:
  """JAX's splash attention, which states no cost: products of [L, H] with [S, H] by kernel.

  Forward: scores, values. Gradient of queries: scores, dP, dQ. Of keys and values: scores, dP, dV,
  dK, and dQ where one kernel makes all three.
  """
  query, key = _shapes(computation, instruction)[:2]
  name = instruction.name
  if "_fwd" in name:
    products = 2
  elif "_dq" in name:
    products = 3
  elif "_dkv" in name:
    products = 5 if len(instruction.shapes) > 2 else 4
  else:
    return None
  return products * 2.0 * query.size * key.dims[-2]


def _numbers(text: str | None) -> list[int]:
  return [int(n) for n in re.findall(r"\d+", text or "")]


# --- Bytes ---


def instruction_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
  """HBM traffic of an instruction that is not part of a fused kernel."""
  opcode = instruction.opcode
  if opcode in FREE or opcode.endswith(("-done", "-update")):
    return 0.0
  if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
    # (there, here) of a copy, (here, there) of a slice.
    ends = instruction.shapes[:2]
    return min(end.bytes for end in ends) * sum(end.space == HBM for end in ends)
  if opcode.endswith("-start"):
    # A tuple of operands, results and semaphores; one of each pair is traffic in, one out.
    return _in_hbm(instruction.shapes)
  known = computation.instructions
  operands = [known[name] for name in instruction.operands if name in known]
  if opcode in SLICES:
    return _in_hbm(instruction.shapes) + sum(
      min(_in_hbm(operands[0].shapes), instruction.shape.bytes) for _ in operands[:1]
    )
  if opcode == "dynamic-update-slice":
    return 2 * operands[1].shape.bytes * (operands[0].shape.space == HBM)
  if opcode == "fusion":
    return _fusion_bytes(module, instruction, operands)
  if opcode == "custom-call":
    return _call_bytes(instruction, operands)
  return _in_hbm(instruction.shapes) + sum(_in_hbm(operand.shapes) for operand in operands)


def _in_hbm(shapes) -> int:
  return sum(shape.bytes for shape in shapes if shape.space == HBM)


def _call_bytes(instruction, operands) -> float:
  estimate = re.search(r'"bytes_accessed":"?(\d+)"?', instruction.attributes)
  target = (instruction.attribute("custom_call_target") or "").strip('"')
  if target != "tpu_custom_call":
    return 0.0
  if estimate and int(estimate[1]):
    # Stated for operands in HBM; what the compiler has brought to the chip before is counted there.
    arrays = {operand.name: operand.shapes for operand in operands} | {"": instruction.shapes}
    on_chip = sum(shape.bytes - _in_hbm([shape]) for shapes in arrays.values() for shape in shapes)
    return max(float(estimate[1]) - on_chip, 0.0)
  return _in_hbm(instruction.shapes) + sum(_in_hbm(operand.shapes) for operand in operands)


def _fusion_bytes(module, fusion, operands) -> float:
  called = fusion.called.get("calls")
  inner = module.computations.get(called[0]) if called else None
  if inner is None:
    return _in_hbm(fusion.shapes) + sum(_in_hbm(operand.shapes) for operand in operands)
  read = 0.0
  for place, operand in enumerate(operands):
    if operand.shape.space == HBM and place < len(inner.parameters):
      read += _read_of(inner, inner.parameters[place])
  return read + _written(inner, fusion)


def _read_of(inner: Computation, parameter: Instruction) -> float:
  """What a kernel reads of an operand: all of it, or the slices that it takes."""
  users, read = list(_readers(inner, parameter)), 0.0
  for user, source in users:
    if user.opcode in SLICES and user.operands[0] == source:
      read += user.shape.bytes
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == source:
      read += 0  # updated in place
    else:
      return parameter.shape.bytes
  return min(read, parameter.shape.bytes)


def _readers(inner: Computation, instruction: Instruction):
  """(reader, what it reads), seen through bitcasts."""
  for user in inner.users[instruction.name]:
    if user.opcode == "bitcast":
      yield from _readers(inner, user)
    else:
      yield user, instruction.name


def _written(inner: Computation, fusion: Instruction) -> float:
  """What a kernel writes: its results, or the slices of them that it updates in place."""
  roots = [inner.root]
  if inner.root.opcode == "tuple":
    roots = [inner.instructions[name] for name in inner.root.operands]
  total = 0.0
  for root, shape in zip(roots, fusion.shapes, strict=False):
    while root.opcode == "bitcast":
      root = inner.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
      shape = dataclasses.replace(inner.instructions[root.operands[1]].shape, space=shape.space)
    total += _in_hbm([shape])
  return total
