"""The text of a compiled XLA program, read into computations and instructions.

Only what the cost of a program needs: shapes, operands, called computations, and how many times
each loop runs. XLA's own cost analysis counts the body of a loop once, so it is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

DTYPE_BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
  "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
CALLS = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)="
                   r"(\{[^}]*\}|%?[\w.\-]+)")  # fmt: skip
TWO_BRANCHES = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
BEGINS = re.compile(r"\s+(ROOT )?%?[\w.\-]+ = ")
HBM = 0  # the memory space that a layout without S(...) is in


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array: its dtype, its dimensions, and the memory space it lies in (0: HBM; 1: VMEM)."""

  dtype: str
  dims: tuple[int, ...]
  space: int = HBM

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of tiles; 0 for tokens and other things that are no arrays."""
    bits = DTYPE_BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
    return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    shapes: of the result; several for a tuple, flattened.
    operands: names of instructions of the same computation, or the text of a constant.
    attributes: what follows the operands, as text.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str

  @property
  def shape(self) -> Shape:
    return self.shapes[0]

  @functools.cached_property
  def op_name(self) -> str:
    """The path of names that JAX gave it: scopes, layers and the primitive."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @functools.cached_property
  def called(self) -> dict[str, tuple[str, ...]]:
    """How it calls computations -> their names."""
    head = self.attributes.partition("metadata=")[0]
    found = {
      how: tuple(name.strip().lstrip("%") for name in names.strip("{}").split(",") if name.strip())
      for how, names in CALLS.findall(head)
    }
    branches = tuple(TWO_BRANCHES.findall(head))
    return found | ({"branch_computations": branches} if branches else {})

  def attribute(self, name: str) -> str | None:
    """The text of `name=...`: a word, or all between braces."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name in program order; the last one marked ROOT is its result."""

  name: str
  instructions: dict[str, Instruction]
  root: Instruction

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    found = [i for i in self.instructions.values() if i.opcode == "parameter"]
    return tuple(sorted(found, key=lambda i: int(i.operands[0])))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Instruction -> those that read it."""
    users = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        if operand in users:
          users[operand].append(instruction)
    return users


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name, and the one that it starts with."""

  computations: dict[str, Computation]
  entry: Computation


def parse(text: str) -> Module:
  """The text of `compiled.as_text()`.

  Raises:
    ValueError: if it has no entry computation.
  """
  computations, entry = {}, None
  name, lines = "", None
  for line in text.splitlines():
    if lines is None:
      header = HEADER.match(line)
      if header:
        name, lines = header[2], []
        entry = name if header[1] else entry
    elif line == "}":
      computations[name] = _computation(name, lines)
      lines = None
    elif BEGINS.match(line):
      lines.append(line)
    elif lines:
      lines[-1] += line  # an attribute of a kernel may hold line breaks
  if entry is None:
    raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
  return Module(computations, computations[entry])


def _computation(name: str, lines: list[str]) -> Computation:
  parsed = [parse_instruction(line) for line in lines]
  roots = [i for i, line in zip(parsed, lines, strict=True) if line.lstrip().startswith("ROOT ")]
  return Computation(name, {i.name: i for i in parsed}, roots[0] if roots else parsed[-1])


def parse_instruction(line: str) -> Instruction:
  """`%name = type opcode(operands), attributes`."""
  left, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
  end = _type_end(right)
  opcode, _, rest = right[end:].lstrip().partition("(")
  close = _closing(rest)
  operands = tuple(_operand(part) for part in _split(rest[:close]))
  return Instruction(
    name=left.lstrip("%"),
    opcode=opcode,
    shapes=parse_shapes(right[:end]),
    operands=operands,
    attributes=rest[close + 1 :].lstrip(", "),
  )


def parse_shapes(text: str) -> tuple[Shape, ...]:
  return tuple(
    Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), _space(layout))
    for dtype, dims, layout in SHAPE.findall(text)
  ) or (Shape("token", ()),)


def _space(layout: str) -> int:
  found = re.search(r"S\((\d+)\)", layout)
  return int(found[1]) if found else HBM


def _type_end(text: str) -> int:
  """A type ends at the first space outside its brackets."""
  depth = 0
  for place, char in enumerate(text):
    if char in "([{":
      depth += 1
    elif char in ")]}":
      depth -= 1
    elif char == " " and depth == 0:
      return place
  return len(text)


def _closing(text: str) -> int:
  depth = 0
  for found in re.finditer(r"[()]", text):
    depth += 1 if found[0] == "(" else -1
    if depth < 0:
      return found.start()
  return len(text)


def _split(text: str) -> Iterator[str]:
  depth, start = 0, 0
  for found in re.finditer(r"[(){}\[\],]", text):
    if found[0] == "," and depth == 0:
      yield text[start : found.start()]
      start = found.end()
    elif found[0] != ",":
      depth += 1 if found[0] in "({[" else -1
  if text[start:].strip():
    yield text[start:]


def _operand(text: str) -> str:
  """The name, without the type that some versions print before it, or a constant."""
  text = re.sub(r"/\*.*?\*/", "", text).strip()
  return text.split(" ")[-1].lstrip("%") if text else ""
