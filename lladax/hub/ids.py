"""Which ids mean mask, end of text and padding in a folder, and which one ends a turn.

In this order: what the caller says, config.json, the tokenizer's files, what the family was
published with; else an error that says how to pass them. Nothing is guessed.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from absl import logging

from lladax.data.tokenizer import EOS_NAMES, MASK_NAMES, PAD_NAMES
from lladax.hub.reader import FolderError

# Key of config.json and of `ModelConfig`; key of tokenizer_config.json; names in vocabularies.
ROLES = {
  "mask_token_id": ("mask_token", MASK_NAMES),
  "eos_token_id": ("eos_token", EOS_NAMES),
  "pad_token_id": ("pad_token", PAD_NAMES),
}


def settle_ids(
  folder: str | os.PathLike,
  config: Mapping[str, Any],
  *,
  published: Mapping[str, int],
  asked: Mapping[str, int] | None = None,
  needs_mask: bool = True,
) -> dict[str, int | None]:
  """`mask_token_id`, `eos_token_id` and `pad_token_id` of the model in a folder.

  Args:
    folder: with or without tokenizer files.
    config: content of its config.json.
    published: ids of the family's released checkpoints; those beyond this vocabulary do not count.
    asked: what the caller knows better, by the keys above.
    needs_mask: False for an autoregressive model: without a mask, its id is None.

  Raises:
    ValueError: for an id that nothing tells or that is outside the vocabulary, naming what to pass;
      for a mask that is also end of text or padding; for an unknown key in `asked`.
  """
  asked = {key: i for key, i in (asked or {}).items() if i is not None}
  if unknown := [key for key in asked if key not in ROLES]:
    raise ValueError(f"ids: unknown key {unknown[0]!r}; known: {', '.join(ROLES)}")
  vocab_size = config.get("embedding_size") or config.get("vocab_size")
  tokens = added_tokens(folder)
  names = tokenizer_config(folder)
  settled: dict[str, int | None] = {}
  for key, (token_key, known_names) in ROLES.items():
    by_tokenizer = _from_tokenizer(names.get(token_key), known_names, tokens)
    found = [
      ("the caller", asked.get(key)),
      ("config.json", _first(config.get(key))),
      ("the tokenizer", by_tokenizer),
      ("the family", _within(published.get(key), vocab_size)),
    ]
    if key == "pad_token_id":
      found.append(("end of text", settled["eos_token_id"]))
    source, value = next(((s, i) for s, i in found if i is not None), (None, None))
    if value is None and key == "mask_token_id" and not needs_mask:
      settled[key] = None
      continue
    settled[key] = _checked(key, value, source, vocab_size, folder)
    if key == "mask_token_id" and by_tokenizer not in (None, value):
      logging.warning(
        "%s: the mask is %d by %s, but the tokenizer has it at %d", folder, value, source,
        by_tokenizer,
      )  # fmt: skip
  _require_distinct(settled, folder)
  return settled


def end_of_turn_id(engine: tokenizers.Tokenizer, token: str, *, mask_id: int | None) -> int:
  """The id of the token that ends a turn, read from the tokenizer.

  Raises:
    ValueError: if it is not one token, or if it is MASK: the tokenizer of Ling 2.0 has
      `<|role_end|>` at 156895, which is MASK in LLaDA-MoE.
  """
  found = engine.token_to_id(token)
  if found is None:
    raise ValueError(
      f"the chat template ends turns with {token!r}, which is no token of this tokenizer; use the "
      "tokenizer.json of the released model, or another template"
    )
  if found == mask_id:
    raise ValueError(
      f"{token!r} has id {found} in this tokenizer, which is the mask of the model: it is the "
      "tokenizer of another model (Ling 2.0 has <|role_end|> at 156895); use the tokenizer.json "
      "that was released with these weights"
    )
  return found


# --- the tokenizer's files -----------------------------------------------------------------------


def tokenizer_config(folder: str | os.PathLike) -> dict[str, Any]:
  """`tokenizer_config.json` over `special_tokens_map.json`; empty where a folder has neither.

  Raises:
    FolderError: if one is not a JSON object.
  """
  return {
    **read_optional(folder, "special_tokens_map.json"),
    **read_optional(folder, "tokenizer_config.json"),
  }


def added_tokens(folder: str | os.PathLike) -> dict[str, int]:
  """Ids of the added tokens by content, from the files that list them.

  `tokenizer.json` counts before `tokenizer_config.json`: it is what encodes.

  Raises:
    FolderError: if a file is malformed.
  """
  tokens = {}
  for content, i in read_optional(folder, "added_tokens.json").items():
    tokens[content] = _token_id(folder, "added_tokens.json", content, i)
  for entry in added_entries(folder):
    tokens[entry["content"]] = entry["id"]
  for entry in listed_entries(folder, read_optional(folder, "tokenizer.json")):
    tokens[entry["content"]] = entry["id"]
  return tokens


def listed_entries(folder: str | os.PathLike, description: Mapping[str, Any]) -> list[dict]:
  """`added_tokens` of a tokenizer.json's content.

  Raises:
    FolderError: if one has no content or no id.
  """
  entries = description.get("added_tokens") or []
  if not isinstance(entries, list):
    raise FolderError(f"{folder}: added_tokens in tokenizer.json is no list but {entries!r}")
  for entry in entries:
    if not isinstance(entry, dict) or (content := token_text(entry)) is None:
      raise FolderError(f"{folder}: tokenizer.json has an added token without content: {entry!r}")
    _token_id(folder, "tokenizer.json", content, entry.get("id"))
  return entries


def added_entries(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """`added_tokens_decoder` of tokenizer_config.json in the form of tokenizer.json's added tokens.

  Raises:
    FolderError: if it is malformed.
  """
  decoder = read_optional(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
  if not isinstance(decoder, dict):
    raise FolderError(f"{folder}: added_tokens_decoder in tokenizer_config.json is no object")
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
  entries = []
  for i, entry in decoder.items():
    content = token_text(entry)
    if content is None or not str(i).isdecimal():
      raise FolderError(
        f"{folder}: added_tokens_decoder in tokenizer_config.json is malformed at {i!r}: {entry!r}"
      )
    told = entry if isinstance(entry, dict) else {}
    flags_told = {flag: bool(told.get(flag, default)) for flag, default in flags.items()}
    entries.append({"id": int(i), "content": content, **flags_told})
  return sorted(entries, key=lambda entry: entry["id"])


def token_text(entry: Any) -> str | None:
  """A special token as these files write it: its text, or an object with its content."""
  if isinstance(entry, Mapping):
    entry = entry.get("content")
  return entry if isinstance(entry, str) else None


def read_optional(folder: str | os.PathLike, name: str) -> dict[str, Any]:
  path = pathlib.Path(folder) / name
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise FolderError(f"{path} is not JSON ({error}); download it again") from None
  if not isinstance(content, dict):
    raise FolderError(f"{path} is not a JSON object but {str(content)[:50]!r}")
  return content


def _token_id(folder: str | os.PathLike, file: str, content: str, i: Any) -> int:
  if type(i) is not int or i < 0:
    raise FolderError(f"{folder}: {file} gives token {content!r} the id {i!r}")
  return i


def _from_tokenizer(named: Any, known: tuple[str, ...], tokens: Mapping[str, int]) -> int | None:
  candidates = (token_text(named), *known)
  return next((tokens[name] for name in candidates if name in tokens), None)


def _first(value: Any) -> Any:
  """A config may list several ends of text; the first is the one that is written."""
  return next(iter(value), None) if isinstance(value, list) else value


def _within(value: int | None, vocab_size: Any) -> int | None:
  fits = value is not None and isinstance(vocab_size, int) and value < vocab_size
  return value if fits else None


def _checked(key: str, value: Any, source: str | None, vocab_size: Any, folder: Any) -> int:
  advice = f'pass ids={{"{key}": ...}}, or --{key.removesuffix("_token_id")}_id on the command line'
  if value is None:
    raise ValueError(
      f"{folder}: neither config.json nor the tokenizer says what {key} is, and the family's "
      f"published id is outside this vocabulary of {vocab_size}; {advice}"
    )
  if type(value) is not int or value < 0 or isinstance(vocab_size, int) and value >= vocab_size:
    raise ValueError(
      f"{folder}: {key} is {value!r} by {source}, no id of the vocabulary of {vocab_size}; {advice}"
    )
  return value


def _require_distinct(settled: Mapping[str, int | None], folder: Any):
  mask = settled["mask_token_id"]
  for key in ("eos_token_id", "pad_token_id"):
    if mask is not None and settled[key] == mask:
      raise ValueError(
        f"{folder}: mask_token_id and {key} are both {mask}; the mask is an input only, never text: "
        f'pass ids={{"mask_token_id": ...}} or ids={{"{key}": ...}}'
      )
