"""Frozen dataclasses as the config format: overrides by path, help, difference, text and JSON.

A config is a tree of frozen, keyword-only dataclasses; a choice in it (a noise schedule, a time
sampler) is an object of some class, not a string. Text is read with `ast` and never evaluated: a
class is looked up by its name among the subclasses of the field's annotated type, so a class that
was just written needs no registration.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class ConfigError(ValueError):
  """A mistake of whoever wrote the config or the command; its text is one line."""


class Difference(NamedTuple):
  path: str
  left: str
  right: str

  def __str__(self):
    return f"{self.path}: {self.left} -> {self.right}"


def override(config, assignments: Sequence[str]):
  """The config with each `"a.b=value"` applied, in order; every `__post_init__` runs once, at the end.

  The text of a value is read by the annotation of its field: `3`, `1e-4`, `true`, `None` for an
  optional field, `(0.9, 0.95)`, text without quotes, and objects: `Threshold(0.7)`,
  `Objective(times=Stratified())`. A later assignment wins; one to a whole object drops those made
  before to its fields.

  Raises:
    ConfigError: for an unknown field, a value of another type, or what a `__post_init__` refuses.
  """
  root = _Node()
  for assignment in assignments:
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
      raise ConfigError(f"{assignment!r}: expected field=value, for example steps=100")
    root.insert(path.strip().split("."), text.strip())
  return _rebuild(config, root, ())


@dataclasses.dataclass
class _Node:
  """What was assigned to one path: the text of a whole value, then changes to its fields."""

  text: str | None = None
  children: dict[str, _Node] = dataclasses.field(default_factory=dict)

  def insert(self, path: list[str], text: str):
    if not path:
      self.text, self.children = text, {}
    else:
      self.children.setdefault(path[0], _Node()).insert(path[1:], text)


def _rebuild(config, node: _Node, path: tuple[str, ...]):
  hints = _hints(type(config))
  changes = {}
  for name, child in node.children.items():
    child_path = (*path, name)
    dotted = ".".join(child_path)
    if name not in hints:
      raise ConfigError(_unknown_field(dotted, name, type(config), hints))
    value = getattr(config, name)
    if child.text is not None:
      value = parse(child.text, hints[name], path=dotted)
    if child.children and not _is_config(value):
      inner = f"{dotted}.{next(iter(child.children))}"
      advice = (
        f"; first set it to one of {_class_names(hints[name])}" if _classes(hints[name]) else ""
      )
      raise ConfigError(f"{inner}: {dotted} is {value!r} and has no fields{advice}")
    changes[name] = _rebuild(value, child, child_path) if child.children else value
  return _construct(dataclasses.replace, ".".join(path), config, **changes)


def _unknown_field(dotted: str, name: str, cls: type, known) -> str:
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  hint = f" did you mean {close[0]!r}?" if close else ""
  return f"{dotted}: {cls.__name__} has no field {name!r};{hint} fields: {', '.join(known)}"


def _construct(make, path: str, /, *args, **kwargs):
  """Calls a constructor; a ValueError or TypeError of its becomes one line that names the path."""
  try:
    return make(*args, **kwargs)
  except ConfigError:
    raise
  except (ValueError, TypeError) as error:
    text = " ".join(str(error).split())
    raise ConfigError(f"{path}: {text}" if path else text) from error


# --- Text to values ---


def parse(text: str, hint, *, path: str = "value"):
  """The value that `text` writes, of the annotated type `hint`; the inverse of `repr`.

  Raises:
    ConfigError: if the text is not a value of that type, or a `__post_init__` refuses it.
  """
  hint = _plain(hint)
  options = typing.get_args(hint) if _is_union(hint) else (hint,)
  if type(None) in options and text in ("None", "none"):
    return None
  words = [word for option in options for word in _words(option)]
  reason = ""
  try:
    # Text that is a value of a narrower type is that value; plain text comes last.
    return text if text in words else _build(ast.parse(text, mode="eval").body, hint, path)
  except (SyntaxError, _Mismatch) as error:
    if str in options:
      return text
    reason = f" ({error})" if isinstance(error, _Mismatch) and str(error) else ""
  raise ConfigError(f"{path}={text}: expected {_type_name(hint)}{reason}")


def _words(hint) -> tuple:
  return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


class _Mismatch(Exception):
  """The syntax tree is not a value of the type asked for."""


def _build(node: ast.expr, hint, path: str):
  hint = _plain(hint)
  if _is_union(hint):
    return _build_union(node, typing.get_args(hint), path)
  if typing.get_origin(hint) is typing.Literal:
    value = _literal(node)
    if value in typing.get_args(hint):
      return value
  elif hint is bool:
    name = node.id if isinstance(node, ast.Name) else repr(_literal(node))
    if name.lower() in ("true", "false"):
      return name.lower() == "true"
  elif hint is float and isinstance(node, ast.Name | ast.UnaryOp | ast.Constant):
    return _float(node)
  elif hint in (int, str, type(None)):
    value = _literal(node)
    if type(value) is hint:
      return value
  elif hint is tuple or typing.get_origin(hint) is tuple:
    return _build_tuple(node, typing.get_args(hint) or (Any, ...), path)
  elif isinstance(node, ast.Call | ast.Name) and _classes(hint):
    return _build_object(node, hint, path)
  elif hint is Any:
    return _build_any(node, path)
  raise _Mismatch()


def _build_any(node: ast.expr, path: str):
  if isinstance(node, ast.Tuple | ast.List):
    return tuple(_build_any(item, path) for item in node.elts)
  return _literal(node)


def _build_union(node: ast.expr, options, path: str):
  mismatch = _Mismatch()
  # int before float: 3 stays an int where both are allowed.
  for option in sorted(options, key=lambda option: (option is float, option is str)):
    try:
      return _build(node, option, path)
    except _Mismatch as error:
      mismatch = error if str(error) else mismatch
  raise mismatch


def _literal(node: ast.expr):
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError) as error:
    raise _Mismatch() from error


def _float(node: ast.expr) -> float:
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
    return -_float(node.operand) if isinstance(node.op, ast.USub) else _float(node.operand)
  if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
    return float(node.id)
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return float(node.value)
  raise _Mismatch()


def _build_tuple(node: ast.expr, items, path: str) -> tuple:
  if not isinstance(node, ast.Tuple | ast.List):
    raise _Mismatch()
  if len(items) == 2 and items[1] is Ellipsis:
    items = (items[0],) * len(node.elts)
  if len(items) != len(node.elts):
    raise _Mismatch(f"{len(items)} values, not {len(node.elts)}")
  return tuple(_build(item, hint, path) for item, hint in zip(node.elts, items, strict=True))


def _build_object(node: ast.Call | ast.Name, hint, path: str):
  """`Name(...)`, or `Name` alone for a class that needs no values."""
  name = node.func if isinstance(node, ast.Call) else node
  if not isinstance(name, ast.Name):
    raise _Mismatch()
  cls = _class_named(name.id, hint)
  hints = _hints(cls)
  args, keywords = (node.args, node.keywords) if isinstance(node, ast.Call) else ([], [])
  if len(args) > len(hints):
    raise _Mismatch(f"{cls.__name__} has {len(hints)} fields, not {len(args)}")
  # By position even for keyword-only classes: Threshold(0.7) is what one types.
  given = dict(zip(hints, args, strict=False)) | {word.arg: word.value for word in keywords}
  values = {}
  for field, value in given.items():
    if field not in hints:
      raise ConfigError(_unknown_field(f"{path}.{field}", str(field), cls, hints))
    try:
      values[field] = _build(value, hints[field], f"{path}.{field}")
    except _Mismatch as error:
      expected = _type_name(hints[field])
      raise ConfigError(f"{path}.{field}={ast.unparse(value)}: expected {expected}") from error
  return _construct(cls, path, **values)


# --- Types ---


def _plain(hint):
  while typing.get_origin(hint) is typing.Annotated:
    hint = typing.get_args(hint)[0]
  return hint


def _is_union(hint) -> bool:
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_config(value) -> bool:
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _hints(cls: type) -> dict[str, Any]:
  """Annotated types of the fields that `__init__` takes, in order."""
  hints = typing.get_type_hints(cls, include_extras=True)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _classes(hint) -> list[type]:
  """The concrete dataclasses that a field with this annotation may hold."""
  hint = _plain(hint)
  if _is_union(hint):
    return [cls for option in typing.get_args(hint) for cls in _classes(option)]
  if not isinstance(hint, type) or hint in (object, Any):
    return []
  found = dict.fromkeys(_with_subclasses(hint))
  return [cls for cls in found if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)]


def _with_subclasses(cls: type) -> Iterator[type]:
  yield cls
  for subclass in type.__subclasses__(cls):
    yield from _with_subclasses(subclass)


def _class_named(name: str, hint) -> type:
  # The newest: a notebook cell that is run again defines its class again.
  for cls in reversed(_classes(hint)):
    if cls.__name__ == name:
      return cls
  raise _Mismatch(f"{name!r} is not among {_class_names(hint)}")


def _class_names(hint) -> str:
  return ", ".join(sorted({cls.__name__ for cls in _classes(hint)}))


def _type_name(hint) -> str:
  hint = _plain(hint)
  if _is_union(hint):
    return " or ".join(_type_name(option) for option in typing.get_args(hint))
  if isinstance(hint, type) and typing.get_origin(hint) is None:
    names = _class_names(hint)
    if names and names != hint.__name__:
      return f"{hint.__name__}, one of {names}"
    return "None" if hint is type(None) else hint.__name__
  return str(hint).replace("typing.", "")


# --- Help ---


def fields_help(config) -> str:
  """A line for every field: its path, type, value and what its class says about it."""
  return "\n".join(_help_lines(config, ""))


def _help_lines(config, prefix: str) -> Iterator[str]:
  docs = _field_docs(type(config))
  for name, hint in _hints(type(config)).items():
    value = getattr(config, name)
    shown = (
      f"{type(value).__name__}(...)" if _is_config(value) and _hints(type(value)) else repr(value)
    )
    doc = f"  # {docs[name]}" if name in docs else ""
    yield f"  {prefix}{name}: {_type_name(hint)} = {shown}{doc}"
    if _is_config(value):
      yield from _help_lines(value, f"{prefix}{name}.")


def _field_docs(cls: type) -> dict[str, str]:
  """Comments beside the fields, and entries `name: text` under "Attributes:" in the docstring."""
  docs = {}
  for base in reversed(cls.__mro__):
    if not dataclasses.is_dataclass(base):
      continue
    try:
      source = inspect.getsource(base)
    except (OSError, TypeError):
      source = ""
    names = "|".join(re.escape(field.name) for field in dataclasses.fields(base)) or "$^"
    docs |= dict(re.findall(rf"^\s+({names}):[^#\n]*#\s*(.+?)\s*$", source, re.MULTILINE))
    doc = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(rf"^ +({names}): (.*(?:\n(?: {{4,}}|  +(?!\w+:)).*)*)", doc, re.MULTILINE)
    docs |= {name: " ".join(text.split()) for name, text in entries}
  return docs


# --- JSON and difference ---


def to_tree(value):
  """The config as JSON values: a dataclass becomes a dict with its class under "class"."""
  if _is_config(value):
    fields = {field.name: to_tree(getattr(value, field.name)) for field in _init_fields(value)}
    return {"class": _class_tag(type(value)), **fields}
  if isinstance(value, tuple | list):
    return [to_tree(item) for item in value]
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise ConfigError(f"{value!r} of type {type(value).__name__} cannot be stored in a config")


def _init_fields(config):
  return [field for field in dataclasses.fields(config) if field.init]


def _class_tag(cls: type) -> str:
  module = cls.__module__
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  # `python -m experiments.name` runs the module under another name.
  if module == "__main__" and spec is not None:
    module = spec.name.removesuffix(".__main__")
  return f"{module}:{cls.__qualname__}"


def to_json(config) -> str:
  """Text of `to_tree(config)`, for people and for `from_json`."""
  return json.dumps(to_tree(config), indent=2)


def from_json(text: str):
  """The config that `to_json` wrote. Nothing but dataclasses is built.

  Raises:
    ConfigError: for a class that no longer exists or is no dataclass, a field its class does not
      have, or values that its `__post_init__` refuses.
  """
  try:
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    raise ConfigError(f"the config is not JSON: {error}") from error
  return _from_tree(tree, "config")


def _from_tree(tree, path: str):
  if isinstance(tree, list):
    return tuple(_from_tree(item, f"{path}[{i}]") for i, item in enumerate(tree))
  if not isinstance(tree, dict):
    return tree
  cls = _class_tagged(tree.get("class"), path)
  known = _hints(cls)
  values = {name: value for name, value in tree.items() if name != "class"}
  for name in values:
    if name not in known:
      raise ConfigError(_unknown_field(f"{path}.{name}", name, cls, known))
  values = {name: _from_tree(value, f"{path}.{name}") for name, value in values.items()}
  return _construct(cls, path, **values)


# Modules that saved configs name and whose classes have gone elsewhere since.
_MOVED = {"lladax.infer.denoiser": "lladax.infer.eos"}


def _class_tagged(tag, path: str) -> type:
  module, colon, qualname = str(tag).partition(":")
  module = _MOVED.get(module, module)
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  try:
    running = spec is not None and spec.name.removesuffix(".__main__") == module
    cls = sys.modules["__main__"] if running else importlib.import_module(module)
    for name in qualname.split("."):
      cls = getattr(cls, name)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(f"{path}: there is no class {tag!r} ({error})") from error
  if not colon or not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
    raise ConfigError(f"{path}: {tag!r} is not a dataclass")
  return cls


def diff(left, right) -> list[Difference]:
  """Where two configs differ. Either may be a tree of `to_tree`, even of classes that are gone."""
  flat_left, flat_right = dict(_flatten(left, "")), dict(_flatten(right, ""))
  paths = dict.fromkeys([*flat_left, *flat_right])
  absent = "(absent)"
  pairs = [(path, flat_left.get(path, absent), flat_right.get(path, absent)) for path in paths]
  return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def _flatten(value, path: str) -> Iterator[tuple[str, str]]:
  tree = to_tree(value) if _is_config(value) else value
  if not isinstance(tree, dict):
    yield path, repr(tuple(tree) if isinstance(tree, list) else tree)
    return
  yield path or "class", str(tree.get("class")).rpartition(":")[2]
  for name, item in tree.items():
    if name != "class":
      yield from _flatten(item, f"{path}.{name}" if path else name)
