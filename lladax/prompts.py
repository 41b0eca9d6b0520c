"""A file of prompts, and the file of their answers, which can be gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """One of: a text to continue, messages to answer, a text whose masks are to be filled.

  Raises:
    UnicodeEncodeError: for half of a character, which JSON and a command line may hold.
  """

  prompt: str | None = None
  messages: tuple[Mapping[str, Any], ...] = ()
  infill: str | None = None

  def __post_init__(self):
    json.dumps(self.to_tree(), ensure_ascii=False).encode()

  @property
  def text(self) -> str:
    """What to show of it."""
    if self.messages:
      return str(self.messages[-1].get("content"))
    return self.prompt if self.infill is None else self.infill

  def to_tree(self) -> dict:
    tree = {"prompt": self.prompt, "messages": list(self.messages), "infill": self.infill}
    return {name: value for name, value in tree.items() if value not in (None, [])}


def read_prompts(path: str) -> list[Prompt]:
  """Prompts of a file: JSONL if its name ends so or it begins with a brace, else a line each.

  Raises:
    ValueError: naming the line, for one that is no prompt; without any.
    OSError: for a file that cannot be read.
  """
  content = sys.stdin.read() if path == "-" else pathlib.Path(path).read_text(encoding="utf-8-sig")
  is_json = path.endswith(".jsonl") or (path == "-" and content.lstrip().startswith("{"))
  # Not splitlines: JSON and prose may hold other separators of Unicode's within a line.
  lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
  if not lines:
    raise ValueError(f"{path} holds no prompt")
  if not is_json:
    return [Prompt(prompt=line.removesuffix("\r")) for _, line in lines]
  return [_parse(line, f"{path}:{number}") for number, line in lines]


def _parse(line: str, place: str) -> Prompt:
  try:
    tree = json.loads(line)
  except ValueError as error:
    raise ValueError(f"{place} is not JSON: {error}") from None
  kinds = {"prompt": str, "messages": list, "infill": str}
  given = [name for name in kinds if isinstance(tree, dict) and name in tree]
  if len(given) != 1:
    raise ValueError(f'{place}: expected one of "prompt", "messages" and "infill", got {line[:60]}')
  (name,) = given
  value = tree[name]
  if not isinstance(value, kinds[name]) or value == []:
    raise ValueError(f"{place}: {name} is not what it should be, {kinds[name].__name__}: {value!r}")
  try:
    return Prompt(**{name: tuple(value) if name == "messages" else value})
  except UnicodeEncodeError:
    raise ValueError(f"{place}: {name} holds half of a character: {line[:60]}") from None


class Answers:
  """A JSONL file with an answer to each prompt, `index` telling to which.

  What is there already is kept, if it is of the same prompts and settings. A line that was cut off
  when a run was killed is written again.

  Args:
    path: None for standard output, where nothing is there already.
    settings: whatever answers depend on besides their prompt.

  Attributes:
    missing: numbers of the prompts without an answer.

  Raises:
    ValueError: for a file that holds something else.
  """

  def __init__(self, path: str | None, prompts: list[Prompt], *, settings: str):
    self._path = None if path is None else pathlib.Path(path)
    self._prompts, self._settings = prompts, settings
    done = self._read() if self._path is not None and self._path.exists() else set()
    self.missing = [number for number in range(len(prompts)) if number not in done]

  def __enter__(self) -> Answers:
    self._file = sys.stdout if self._path is None else self._path.open("a", encoding="utf-8")
    return self

  def __exit__(self, *_):
    if self._path is not None:
      self._file.close()

  def add(self, number: int, **fields):
    """Writes the answer to a prompt, so that it is there even if the next moment is the last."""
    row = {"index": number, "key": self._key(number), **self._prompts[number].to_tree(), **fields}
    self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
    self._file.flush()

  def _key(self, number: int) -> str:
    told = json.dumps([self._settings, number, self._prompts[number].to_tree()])
    return hashlib.sha256(told.encode()).hexdigest()[:12]

  def _read(self) -> set[int]:
    content = self._path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done = set()
    for place, line in enumerate(whole.split(b"\n")[:-1], 1):
      try:
        row = json.loads(line.decode("utf-8"))
        number, key = row["index"], row["key"]
        fits = 0 <= number < len(self._prompts) and key == self._key(number)
      except (ValueError, KeyError, TypeError):
        fits = False
      if not fits:
        raise ValueError(
          f"{self._path}:{place} is no answer to these prompts with these settings; name another "
          "--output, or remove it"
        )
      done.add(number)
    if len(whole) < len(content):
      with self._path.open("r+b") as file:
        file.truncate(len(whole))
    return done
