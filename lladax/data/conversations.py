"""Conversations and preference pairs: JSON lines, checked, with file and line in every error.

A line is one object:

  {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
  {"prompt": "2+2?", "chosen": "4", "rejected": "5"}

Both may have an `id` and `metadata`, which are kept and never shown to the network. Instead of
`prompt`, a preference pair may have `messages` that end where the assistant is to answer.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import json
import pathlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz")

_EXTRAS = ("id", "metadata")
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'


class ConversationError(ValueError):
  """What is wrong with a line, after `file:line:`; or with several, a line each."""


@dataclasses.dataclass(frozen=True)
class Message:
  role: str
  content: str

  def as_dict(self) -> dict[str, str]:
    """As chat templates want it."""
    return {"role": self.role, "content": self.content}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
  """Messages with at least one answer of the assistant.

  Attributes:
    messages: in order; at most the first is of the system, the first other one is of the user, and
      no two answers of the assistant follow each other.
    where: `file:line`.
    id, metadata: of the line, for whoever scores the answers.
  """

  messages: tuple[Message, ...]
  where: str
  id: str | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

  @property
  def answers(self) -> list[int]:
    """Indices of the assistant's messages."""
    return [i for i, message in enumerate(self.messages) if message.role == "assistant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
  """Two different answers to the same prompt, the better one first.

  Attributes:
    prompt: messages up to where the assistant answers.
    chosen, rejected: the answers.
    where: `file:line`.
    id, metadata: of the line.
  """

  prompt: tuple[Message, ...]
  chosen: str
  rejected: str
  where: str
  id: str | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


def read_conversations(paths: str | Sequence[str]) -> Iterator[Conversation]:
  """The conversations of JSON lines, one at a time, in order.

  Args:
    paths: files, glob patterns or folders (of `SUFFIXES`); `.gz` is unpacked as it is read.

  Raises:
    FileNotFoundError: for a path that matches nothing.
    ConversationError: for a line that is not one, with file and line.
  """
  for where, line in _lines(paths):
    yield parse_conversation(line, where)


def read_preferences(paths: str | Sequence[str]) -> Iterator[Preference]:
  """The preference pairs of JSON lines; see `read_conversations`."""
  for where, line in _lines(paths):
    yield parse_preference(line, where)


def check_conversations(paths: str | Sequence[str], *, max_errors: int = 20) -> dict[str, int]:
  """Reads all of it, lines of either kind, and counts.

  Args:
    paths: as in `read_conversations`.
    max_errors: how many lines that are wrong are told of before giving up.

  Returns:
    Counts by name: `files`, `conversations`, `preferences`, `messages`, `answers` (turns that can be
    trained on), `unanswered` (conversations whose last message nobody answers), `characters`, and
    `messages of the <role>`.

  Raises:
    FileNotFoundError: for a path that matches nothing.
    ConversationError: one line for each line that is wrong; for files without any line.
  """
  counts: Counter[str] = Counter(files=len(conversation_files(paths)))
  errors: list[str] = []
  for where, line in _lines(paths):
    try:
      _count(counts, _parse_either(line, where))
    except ConversationError as error:
      errors.append(str(error))
      if len(errors) >= max_errors:
        errors.append(f"gave up after {max_errors} errors")
        break
  if not errors and not counts["messages"]:
    errors = [f"{paths!r} has no conversation: every line is blank"]
  if errors:
    raise ConversationError("\n".join(errors))
  return dict(counts)


def conversation_files(paths: str | Sequence[str]) -> list[pathlib.Path]:
  """The files of paths, glob patterns and folders, in order.

  Raises:
    FileNotFoundError: for one that matches nothing.
  """
  names = (paths,) if isinstance(paths, str) else tuple(map(str, paths))
  if not names:
    raise FileNotFoundError("no file of conversations given")
  files: list[pathlib.Path] = []
  for name in names:
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
      found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES))
    elif path.exists():
      found = [path]
    else:
      found = sorted(pathlib.Path(match) for match in glob.glob(str(path), recursive=True))
      found = [file for file in found if file.is_file()]
    if not found:
      raise FileNotFoundError(f"no conversations at {name!r}: no such file, pattern or folder")
    files += found
  return files


# --- one line ------------------------------------------------------------------------------------


def parse_conversation(line: str, where: str) -> Conversation:
  """A line of text as a conversation.

  Raises:
    ConversationError: naming `where`, the field and what was expected.
  """
  return _conversation(_object(line, where), where)


def parse_preference(line: str, where: str) -> Preference:
  """A line of text as a preference pair; see `parse_conversation`."""
  return _preference(_object(line, where), where)


def _parse_either(line: str, where: str) -> Conversation | Preference:
  fields = _object(line, where)
  pair = fields.keys() & {"prompt", "chosen", "rejected"}
  return (_preference if pair else _conversation)(fields, where)


def _conversation(fields: dict[str, Any], where: str) -> Conversation:
  if fields.keys() & {"chosen", "rejected"}:
    raise _error(where, "this is a preference pair, where a conversation was expected")
  _require_fields(fields, ("messages",), where)
  messages = _messages(fields["messages"], where)
  if not any(message.role == "assistant" for message in messages):
    raise _error(where, "no message of the assistant: there is nothing to learn")
  return Conversation(messages=messages, where=where, **_extras(fields, where))


def _preference(fields: dict[str, Any], where: str) -> Preference:
  if "chosen" not in fields and "rejected" not in fields and "messages" in fields:
    raise _error(where, "this is a conversation, where a preference pair was expected")
  name = "messages" if "messages" in fields else "prompt"
  _require_fields(fields, (name, "chosen", "rejected"), where)
  prompt = fields[name]
  if name == "prompt" and isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  messages = _messages(prompt, where, name)
  if messages[-1].role == "assistant":
    raise _error(where, f"{name} ends with the assistant; `chosen` and `rejected` answer it")
  chosen, rejected = (_answer(fields[key], where, key) for key in ("chosen", "rejected"))
  if chosen == rejected:
    raise _error(where, "chosen and rejected are the same text: no preference")
  extras = _extras(fields, where)
  return Preference(prompt=messages, chosen=chosen, rejected=rejected, where=where, **extras)


def _answer(value: Any, where: str, field: str) -> str:
  """Text; or, as some data sets have it, a list of one message of the assistant."""
  if isinstance(value, list):
    if len(value) != 1:
      raise _error(where, f"{field}: expected text or one message, got {len(value)} messages")
    message = _message(value[0], where, f"{field}[0]")
    if message.role != "assistant":
      raise _error(where, f"{field}[0].role: expected assistant, got {message.role!r}")
    return message.content
  return _text(value, where, field)


def _messages(value: Any, where: str, field: str = "messages") -> tuple[Message, ...]:
  if not isinstance(value, list):
    raise _error(where, f"{field}: expected a list of messages, got {_kind(value)}")
  if not value:
    raise _error(where, f"{field}: expected at least one message, got none")
  messages = tuple(_message(entry, where, f"{field}[{i}]") for i, entry in enumerate(value))
  roles = [message.role for message in messages]
  if "system" in roles[1:]:
    raise _error(where, f"{field}[{roles.index('system', 1)}]: the system speaks first or not")
  first = 1 if roles[0] == "system" else 0
  if len(roles) == first:
    raise _error(where, f"{field}: nobody but the system speaks")
  if roles[first] != "user":
    raise _error(where, f"{field}[{first}]: the user speaks first, got the {roles[first]}")
  for i in range(1, len(roles)):
    if roles[i - 1] == roles[i] == "assistant":
      raise _error(where, f"{field}[{i}]: the assistant answers twice; join the two messages")
  return messages


def _message(entry: Any, where: str, field: str) -> Message:
  if not isinstance(entry, dict):
    raise _error(where, f"{field}: expected a role and a content, got {_kind(entry)}")
  _require_fields(entry, ("role", "content"), where, f"{field}.", optional=())
  role = entry["role"]
  if role not in ROLES:
    raise _error(where, f"{field}.role: expected one of {', '.join(ROLES)}, got {role!r}")
  return Message(role, _text(entry["content"], where, f"{field}.content"))


def _text(value: Any, where: str, field: str) -> str:
  if not isinstance(value, str):
    raise _error(where, f"{field}: expected text, got {_kind(value)}")
  if not value.strip():
    raise _error(where, f"{field} is empty")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise _error(where, f"{field} has half a surrogate pair at {error.start}: no text") from None
  return value


def _extras(fields: dict[str, Any], where: str) -> dict[str, Any]:
  identity, metadata = fields.get("id"), fields.get("metadata")
  if identity is not None and type(identity) not in (str, int):
    raise _error(where, f"id: expected text or a whole number, got {_kind(identity)}")
  if metadata is not None and not isinstance(metadata, dict):
    raise _error(where, f"metadata: expected an object, got {_kind(metadata)}")
  return {"id": None if identity is None else str(identity), "metadata": metadata or {}}


def _require_fields(
  fields: dict[str, Any],
  required: Sequence[str],
  where: str,
  prefix: str = "",
  optional: Sequence[str] = _EXTRAS,
):
  known = (*required, *optional)
  unknown = [name for name in fields if name not in known]
  if unknown:
    raise _error(where, f"unknown field {prefix}{unknown[0]}; known: {', '.join(known)}")
  missing = [name for name in required if name not in fields]
  if missing:
    raise _error(where, f"{prefix}{missing[0]} is missing")


def _object(line: str, where: str) -> dict[str, Any]:
  def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(entries)
    if len(result) < len(entries):
      twice = next(name for name, n in Counter(name for name, _ in entries).items() if n > 1)
      raise _error(where, f"the field {twice!r} occurs twice in one object")
    return result

  try:
    value = json.loads(line, object_pairs_hook=pairs)
  except json.JSONDecodeError as error:
    at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
    raise _error(where, f"not JSON: {error.msg} at {at}") from None
  except RecursionError:
    raise _error(where, "not JSON that can be read: nested too deeply") from None
  if not isinstance(value, dict):
    raise _error(where, f"expected an object like {_EXAMPLE}, got {_kind(value)}")
  return value


def _error(where: str, text: str) -> ConversationError:
  return ConversationError(f"{where}: {text}")


_KINDS: tuple[tuple[type, Callable[[Any], str]], ...] = (
  (bool, lambda value: "true" if value else "false"),
  (int | float, lambda value: f"the number {value}"),
  (str, lambda value: f"the text {value[:30]!r}"),
  (list, lambda value: "a list"),
  (dict, lambda value: "an object"),
)


def _kind(value: Any) -> str:
  return next((name(value) for kind, name in _KINDS if isinstance(value, kind)), "null")


# --- files and counts ----------------------------------------------------------------------------


def _lines(paths: str | Sequence[str]) -> Iterator[tuple[str, str]]:
  """(`file:line`, text) of every line that is not blank."""
  for path in conversation_files(paths):
    with path.open("rb") as raw:
      opened: io.BufferedIOBase = gzip.open(raw) if path.name.lower().endswith(".gz") else raw
      number = 0
      try:
        for number, content in enumerate(opened, 1):
          if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")  # as some editors begin a file
          try:
            text = content.decode()
          except UnicodeDecodeError as error:
            raise _error(f"{path}:{number}", f"not UTF-8 at byte {error.start}") from None
          if text.strip():
            yield f"{path}:{number}", text.rstrip("\r\n")
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _error(f"{path}:{number + 1}", f"damaged gzip: {error}") from None


def _count(counts: Counter[str], entry: Conversation | Preference):
  if isinstance(entry, Preference):
    counts["preferences"] += 1
    messages = (*entry.prompt, Message("assistant", entry.chosen))
    counts["characters"] += len(entry.rejected)
  else:
    counts["conversations"] += 1
    messages = entry.messages
    counts["answers"] += len(entry.answers)
    counts["unanswered"] += messages[-1].role != "assistant"
  counts["messages"] += len(messages)
  for message in messages:
    counts[f"messages of the {message.role}"] += 1
    counts["characters"] += len(message.content)
