"""The tokenizer of a folder, read with the ids that the model says, and written for the torch world.

What is read: `tokenizer.json`, or `vocab.json` and `merges.txt` as Qwen and Dream publish them, with
the added tokens and flags of `tokenizer_config.json`.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lladax.data.tokenizer import EOS_TOKEN, MASK_TOKEN, Bytes, JsonTokenizer, Tokenizer
from lladax.hub.chat import ChatTemplate
from lladax.hub.ids import added_entries, listed_entries, read_optional
from lladax.hub.reader import FolderError

VOCABULARY = "tokenizer.json"
# How GPT-2's successors at Qwen cut text before the merges (repository QwenLM/Qwen): contractions,
# words with what stands before them, single digits, signs, line ends, blanks.
_QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_folder_tokenizer(
  folder: str | os.PathLike, *, ids: Mapping[str, int | None]
) -> JsonTokenizer | None:
  """The tokenizer in a folder; None where it has none.

  Args:
    folder: of a released model.
    ids: as `settle_ids` gives them: `mask_token_id`, `eos_token_id`, `pad_token_id`. A mask that is
      an unused row of the embedding gets the name `<|mask|>`; without a mask (an autoregressive
      model) `<|mask|>` is appended, since every tokenizer here has one.

  Raises:
    FolderError: for a file that is not what its name says, or a vocabulary without a token at one
      of the ids.
  """
  folder = pathlib.Path(folder)
  description = _describe(folder)
  if description is None:
    return None
  names = {i: token for token, i in _vocabulary(folder, description).items()}
  names |= {entry["id"]: entry["content"] for entry in description["added_tokens"]}
  mask_id, eos_id, pad_id = (ids[f"{role}_token_id"] for role in ("mask", "eos", "pad"))
  if mask_id is None:
    mask_id = next((i for i, name in names.items() if name == MASK_TOKEN), max(names) + 1)
  elif mask_id not in names and MASK_TOKEN in names.values():
    at = next(i for i, name in names.items() if name == MASK_TOKEN)
    raise FolderError(
      f"{folder}: the mask is id {mask_id}, where its tokenizer has no token, but {MASK_TOKEN!r} "
      f'is {at} there; if that is the mask, pass ids={{"mask_token_id": {at}}}'
    )
  names.setdefault(mask_id, MASK_TOKEN)
  for role, i in (("eos", eos_id), ("pad", pad_id)):
    if i not in names:
      raise FolderError(
        f"{folder}: {role}_token_id is {i}, where its tokenizer, with ids up to {max(names)}, has "
        f'no token; it belongs to another model, or pass ids={{"{role}_token_id": ...}}'
      )
  _mark_special(description, {i: names[i] for i in (mask_id, eos_id, pad_id)})
  engine = _engine(folder, description)
  engine.encode_special_tokens = True  # text that spells a special token stays text
  engine.no_padding()
  engine.no_truncation()
  return JsonTokenizer(engine, names[mask_id], names[eos_id], names[pad_id])


def write_folder_tokenizer(
  folder: str | os.PathLike,
  tokenizer: Tokenizer,
  *,
  template: ChatTemplate | None = None,
  max_length: int | None = None,
):
  """Writes `tokenizer.json` and `tokenizer_config.json` as `transformers` reads them.

  Args:
    folder: which exists.
    tokenizer: any of lladax; bytes become a byte-level vocabulary without merges, same ids.
    template: for `apply_chat_template` there.
    max_length: longest sequence of the model, in tokens.
  """
  folder = pathlib.Path(folder)
  if isinstance(tokenizer, Bytes):
    tokenizer = bytes_as_json()
  if not isinstance(tokenizer, JsonTokenizer):
    raise ValueError(f"expected a tokenizer of lladax.data, got {type(tokenizer).__name__}")
  config: dict[str, Any] = dict(template.special_tokens) if template else {}
  config |= {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "mask_token": tokenizer.mask_token,
    "eos_token": tokenizer.eos_token,
    "pad_token": tokenizer.pad_token,
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
  }
  if max_length is not None:
    config["model_max_length"] = max_length
  if template is not None:
    config["chat_template"] = template.source
  (folder / VOCABULARY).write_text(tokenizer.engine.to_str(), encoding="utf-8")
  text = json.dumps(config, indent=2, ensure_ascii=False)
  (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def bytes_as_json() -> JsonTokenizer:
  """`Bytes` as a tokenizer of the `tokenizers` library: the same ids for the same text."""
  plain = Bytes()
  # The library's alphabet stands for bytes in the order: printable ones as themselves, then the
  # others from U+0100 on.
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
  engine = tokenizers.Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
  engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  engine.decoder = decoders.ByteLevel()
  engine.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t in (EOS_TOKEN, MASK_TOKEN)]
  )
  engine.encode_special_tokens = True
  tokenizer = JsonTokenizer(engine, MASK_TOKEN, EOS_TOKEN, EOS_TOKEN)
  assert (tokenizer.eos_id, tokenizer.mask_id) == (plain.eos_id, plain.mask_id)
  return tokenizer


# --- from files to a description, and from a description to the library --------------------------


def _describe(folder: pathlib.Path) -> dict[str, Any] | None:
  """Content of tokenizer.json, with the added tokens of the other files among its own."""
  description = read_optional(folder, VOCABULARY) or _describe_merges(folder)
  if description is None:
    if (folder / "tokenizer.model").exists():
      raise FolderError(
        f"{folder} has a sentencepiece tokenizer.model but no {VOCABULARY}; write one with the "
        "reference's tokenizer: save_pretrained of a fast tokenizer of transformers"
      )
    return None
  added = {entry["content"]: entry for entry in listed_entries(folder, description)}
  for entry in added_entries(folder):
    # The ids of tokenizer.json count, the flags of tokenizer_config.json: so does transformers.
    added[entry["content"]] = {**entry, "id": added.get(entry["content"], entry)["id"]}
  description["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
  return description


def _describe_merges(folder: pathlib.Path) -> dict[str, Any] | None:
  """A byte-level BPE of the Qwen2 kind from vocab.json and merges.txt; None without them."""
  vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
  if not (vocabulary.exists() and merges.exists()):
    return None
  try:
    engine = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
  except Exception as error:  # the library raises a bare Exception
    raise FolderError(f"{folder}: vocab.json and merges.txt are no vocabulary: {error}") from None
  engine.normalizer = normalizers.NFC()
  engine.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])  # fmt: skip
  engine.decoder = decoders.ByteLevel()
  return json.loads(engine.to_str())


def _vocabulary(folder: pathlib.Path, description: Mapping[str, Any]) -> dict[str, int]:
  """Ids by token of the model within the description, without added tokens."""
  model = description.get("model")
  vocabulary = model.get("vocab") if isinstance(model, dict) else None
  if isinstance(vocabulary, list):  # Unigram: pieces with scores
    pieces = [entry[0] if isinstance(entry, list) and entry else None for entry in vocabulary]
    vocabulary = {piece: i for i, piece in enumerate(pieces) if isinstance(piece, str)}
  if not isinstance(vocabulary, dict) or not vocabulary:
    raise FolderError(f"{folder}: {VOCABULARY} has no model with a vocabulary")
  if bad := [token for token, i in vocabulary.items() if type(i) is not int or i < 0]:
    raise FolderError(f"{folder}: {VOCABULARY} gives {bad[0]!r} the id {vocabulary[bad[0]]!r}")
  return vocabulary


def _mark_special(description: dict[str, Any], tokens: Mapping[int, str]):
  """Makes the tokens special added ones, wherever they stood."""
  added = {entry["id"]: entry for entry in description["added_tokens"]}
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  for i, content in tokens.items():
    added[i] = {**flags, **added.get(i, {}), "id": i, "content": content, "special": True}
  description["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])


def _engine(folder: pathlib.Path, description: dict[str, Any]) -> tokenizers.Tokenizer:
  """The library's tokenizer, in which every added token has the id of the description."""
  wanted = {entry["content"]: entry["id"] for entry in description["added_tokens"]}
  engine = _parse(folder, description)
  moved = [token for token, i in wanted.items() if engine.token_to_id(token) != i]
  if moved and isinstance(description["model"]["vocab"], dict):
    # The library numbers added tokens from the end of the vocabulary, whatever the file says; ids
    # beyond a hole stay when the vocabulary itself has the token.
    vocabulary = description["model"]["vocab"]
    taken = {i: token for token, i in vocabulary.items()}
    for token, i in wanted.items():
      if taken.setdefault(i, token) == token:
        vocabulary.setdefault(token, i)
    engine = _parse(folder, description)
    moved = [token for token, i in wanted.items() if engine.token_to_id(token) != i]
  if moved:
    raise FolderError(
      f"{folder}: added token {moved[0]!r} should be id {wanted[moved[0]]}, which another token of "
      f"the vocabulary has, or which {VOCABULARY} cannot express; correct its added_tokens"
    )
  return engine


def _parse(folder: pathlib.Path, description: Mapping[str, Any]) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
  except Exception as error:  # the library raises a bare Exception
    raise FolderError(f"{folder}: {VOCABULARY} is no tokenizer: {error}") from None
