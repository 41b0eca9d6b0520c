"""How often every instruction of a program runs: loops by their trip counts.

The compiler writes a trip count where it knows one; where it does not, the loop's own arithmetic
(start, step, bound) is read. A loop whose bound is data has no count in the program: it is known
by the name of its scope, and whoever plans says how often it is expected to run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

from lladax.scaling.hlo import Computation, Instruction, Module

# The scope's name -> (module, body) -> how often a loop of that scope is expected to run.
Expected = Mapping[str, Callable[[Module, Computation], float]]

KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
PASS_THROUGH = ("convert", "copy", "bitcast", "reshape", "copy-start", "copy-done", "broadcast",
                "opt-barrier", "optimization-barrier")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Visit:
  """A computation that runs, how often, and within which loop body (or the entry).

  Attributes:
    fused: its instructions are part of one fused kernel: only the kernel's ends touch memory.
    loop: a name that is the same for all computations that run within the same body.
  """

  computation: Computation
  times: float
  fused: bool
  loop: str


@dataclasses.dataclass(frozen=True)
class UnknownLoop:
  """A loop whose count is data and whose scope nobody named; it was counted once."""

  name: str
  op_name: str


def visits(module: Module, expected: Expected | None = None) -> tuple[list[Visit], list]:
  """Every computation that runs, with its count, and the loops whose count is not known.

  A branch of a conditional counts as if it were always taken, so the sum is an upper bound there.
  """
  unknown: list[UnknownLoop] = []
  found = list(_visit(module, module.entry, 1.0, False, "entry", expected or {}, unknown))
  return found, unknown


def _visit(module, computation, times, fused, loop, expected, unknown) -> Iterator[Visit]:
  yield Visit(computation, times, fused, loop)
  for instruction in computation.instructions.values():
    for how, names in instruction.called.items():
      if how == "to_apply" and instruction.opcode != "call":
        continue  # the operator of a reduction, a sort, a scatter: scalars
      count, inside = times, loop
      if instruction.opcode == "while":
        trips = trip_count(module, computation, instruction, expected)
        if trips is None:
          if how == "body":
            unknown.append(UnknownLoop(instruction.name, instruction.op_name))
          trips = 1
        count, inside = times * trips, f"{loop}/{instruction.name}"
      for name in names:
        if name in module.computations:
          kernel = fused or instruction.opcode in ("fusion", "custom-call")
          yield from _visit(
            module, module.computations[name], count, kernel, inside, expected, unknown
          )


def trip_count(
  module: Module, parent: Computation, loop: Instruction, expected: Expected
) -> float | None:
  """How often the body runs; None if its bound is data and no scope is expected."""
  known = KNOWN.search(loop.attributes)
  if known:
    return int(known[1])
  body = module.computations[loop.called["body"][0]]
  condition = module.computations[loop.called["condition"][0]]
  counted = _counted(module, parent, loop, condition, body)
  if counted is not None:
    return counted
  for scope, count in expected.items():
    if re.search(rf"\b{re.escape(scope)}\b", loop.op_name):
      return count(module, body)
  return None


def _counted(module, parent, loop, condition, body) -> int | None:
  """ceil((bound - start) / step) of `for (i = start; i < bound; i += step)`."""
  test = _resolve(module, condition, condition.root.name, {})
  if test is None or test[0] != "compare":
    return None
  _, direction, left, right = test
  if left is None or right is None or left[0] != "carry":
    return None
  index = left[1]
  after = _resolve_element(module, body, body.root, index)
  if after is None or after[0] != "add":
    return None
  step = next((term[1] for term in after[1:] if term and term[0] == "constant"), None)
  start = _entering(module, parent, loop, index)
  bound = right[1] if right[0] == "constant" else None
  if right[0] == "carry":
    bound = _entering(module, parent, loop, right[1])
  if step is None or start is None or bound is None or step <= 0:
    return None
  return max(0, -((start - bound - (direction == "LE")) // step))


def _entering(module, parent, loop, index) -> int | None:
  """The constant that element `index` of the carry starts with."""
  tuple_ = parent.instructions.get(loop.operands[0])
  value = None if tuple_ is None else _resolve_element(module, parent, tuple_, index)
  return value[1] if value and value[0] == "constant" else None


def _resolve_element(module, computation, tuple_: Instruction, index: int, bound=None):
  bound = bound or {}
  if tuple_.opcode == "tuple":
    return _resolve(module, computation, tuple_.operands[index], bound)
  if tuple_.opcode == "fusion":
    inner, given = _into(module, computation, tuple_, bound)
    return _resolve_element(module, inner, inner.root, index, given) if inner else None
  if tuple_.opcode in PASS_THROUGH and tuple_.operands:
    source = computation.instructions.get(tuple_.operands[0])
    return None if source is None else _resolve_element(module, computation, source, index, bound)
  return None


def _resolve(module, computation, name: str, bound: dict, depth: int = 0):
  """An integer expression of the loop: ("constant", n), ("carry", i), ("add", a, b), ...

  `bound` gives the values of a fused computation's parameters.
  """
  instruction = computation.instructions.get(name)
  if instruction is None or depth > 24:
    return None

  def value(operand):
    return _resolve(module, computation, operand, bound, depth + 1)

  opcode = instruction.opcode
  if opcode == "constant":
    text = instruction.operands[0] if instruction.operands else ""
    return ("constant", int(text)) if re.fullmatch(r"-?\d+", text) else None
  if opcode == "parameter":
    return bound.get(int(instruction.operands[0]))
  if opcode == "get-tuple-element":
    index = int(instruction.attribute("index"))
    source = computation.instructions.get(instruction.operands[0])
    if source is None:
      return None
    if source.opcode == "parameter" and not bound:
      return ("carry", index)
    return _resolve_element(module, computation, source, index, bound)
  if opcode in PASS_THROUGH:
    return value(instruction.operands[0])
  if opcode == "add":
    return ("add", *(value(operand) for operand in instruction.operands))
  if opcode == "compare":
    direction = instruction.attribute("direction")
    left, right = (value(operand) for operand in instruction.operands)
    if direction in ("GT", "GE"):
      direction, left, right = {"GT": "LT", "GE": "LE"}[direction], right, left
    return ("compare", direction, left, right) if direction in ("LT", "LE") else None
  if opcode in ("fusion", "call"):
    inner, given = _into(module, computation, instruction, bound)
    return None if inner is None else _resolve(module, inner, inner.root.name, given, depth + 1)
  return None


def _into(module, computation, instruction: Instruction, bound: dict):
  """The computation that a fusion or call runs, and the values of its parameters."""
  called = instruction.called.get("calls") or instruction.called.get("to_apply") or ()
  inner = module.computations.get(called[0]) if called else None
  given = {
    place: _resolve(module, computation, operand, bound)
    for place, operand in enumerate(instruction.operands)
  }
  return inner, given or {-1: None}
