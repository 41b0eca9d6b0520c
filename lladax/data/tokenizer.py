"""Text to ids and back: bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json`.

Special ids (mask, end of text, padding) come from the tokenizer only: a document that spells
`<|mask|>` is encoded as those characters, never as the mask.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tokenizers
from absl import logging
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

MASK_TOKEN = "<|mask|>"
EOS_TOKEN = "<|endoftext|>"
# Names under which published tokenizers carry each special token, most specific first.
MASK_NAMES = (MASK_TOKEN, "<|mdm_mask|>", "[MASK]", "<mask>")
EOS_NAMES = (EOS_TOKEN, "<|end_of_text|>", "<eos>", "</s>")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")

_DESCRIPTION = "lladax_tokenizer.json"  # kind and special tokens
_VOCABULARY = "tokenizer.json"
_BPE_RECIPE = "byte-level BPE 1"  # part of the cache key: change it when training changes


class Tokenizer(Protocol):
  """What the data pipeline, the sampler and the facade need of a tokenizer.

  Attributes:
    vocab_size: all ids are below it.
    mask_id: MASK, an input of the network and never a target.
    eos_id: ends every document.
    pad_id: fills rows; often `eos_id`, since padding is told by segment 0 and not by its id.
    byte_lengths: int32[V], UTF-8 bytes that each id stands for (0 for special ids), so that a sum
      over a row is its share of the text; None where an id alone does not tell.
  """

  @property
  def vocab_size(self) -> int: ...
  @property
  def mask_id(self) -> int: ...
  @property
  def eos_id(self) -> int: ...
  @property
  def pad_id(self) -> int: ...
  @property
  def byte_lengths(self) -> np.ndarray | None: ...

  def encode(self, text: str) -> list[int]:
    """Ids of the text; no special id among them."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of each text, as int32 arrays; faster than one by one."""

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Text of the ids; special ids vanish or, on request, are spelled by name.

    Raises:
      ValueError: for an id outside the vocabulary.
    """

  def save(self, directory: str | os.PathLike) -> None:
    """Writes what `load_tokenizer(directory)` reads back."""


@dataclasses.dataclass(frozen=True)
class Bytes:
  """The 256 bytes of UTF-8, then end of text (256, also padding) and MASK (257)."""

  vocab_size: int = dataclasses.field(default=258, init=False)
  eos_id: int = dataclasses.field(default=256, init=False)
  pad_id: int = dataclasses.field(default=256, init=False)
  mask_id: int = dataclasses.field(default=257, init=False)

  @property
  def byte_lengths(self) -> np.ndarray:
    return np.array([1] * 256 + [0, 0], np.int32)

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    ids = _check_ids(ids, self.vocab_size)
    names = {} if skip_special else {self.eos_id: EOS_TOKEN, self.mask_id: MASK_TOKEN}
    parts = (bytes([i]) if i < 256 else names.get(i, "").encode() for i in ids)
    return b"".join(parts).decode("utf-8", "replace")

  def save(self, directory: str | os.PathLike) -> None:
    _write_description(directory, {"kind": "bytes"})


@dataclasses.dataclass(frozen=True, eq=False)
class JsonTokenizer:
  """A tokenizer of the `tokenizers` library with its three special tokens settled.

  Made by `train_bpe`, `read_tokenizer_json` or `load_tokenizer`. The round trip of a byte-level
  tokenizer without a normalizer (as `train_bpe` makes it) is exact; others may, for instance,
  compose accents.
  """

  engine: tokenizers.Tokenizer
  mask_token: str
  eos_token: str
  pad_token: str

  @functools.cached_property
  def vocab_size(self) -> int:
    # Not get_vocab_size(): published vocabularies have holes.
    return max(self.engine.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def mask_id(self) -> int:
    return self.engine.token_to_id(self.mask_token)

  @functools.cached_property
  def eos_id(self) -> int:
    return self.engine.token_to_id(self.eos_token)

  @functools.cached_property
  def pad_id(self) -> int:
    return self.engine.token_to_id(self.pad_token)

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray | None:
    description = json.loads(self.engine.to_str())
    if (description["decoder"] or {}).get("type") != "ByteLevel" or description["normalizer"]:
      return None
    lengths = np.zeros(self.vocab_size, np.int32)
    for token, i in self.engine.get_vocab(with_added_tokens=False).items():
      lengths[i] = len(token)  # the byte-level alphabet writes one character a byte
    for added in description["added_tokens"]:
      lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return lengths

  def encode(self, text: str) -> list[int]:
    return self._without_special(self.engine.encode(text, add_special_tokens=False).ids)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self.engine.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(self._without_special(encoding.ids), np.int32) for encoding in encodings]

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    return self.engine.decode(_check_ids(ids, self.vocab_size), skip_special_tokens=skip_special)

  def save(self, directory: str | os.PathLike) -> None:
    special = {name: getattr(self, name) for name in ("mask_token", "eos_token", "pad_token")}
    _write_description(directory, {"kind": "json", **special})
    (epath.Path(directory) / _VOCABULARY).write_text(self.engine.to_str())

  def _without_special(self, ids: list[int]) -> list[int]:
    # Vocabularies of whole words can hold a special token as a word; it cannot be spelled then.
    for name in {self.mask_token, self.eos_token, self.pad_token}:
      if (i := self.engine.token_to_id(name)) in ids:
        raise ValueError(
          f"the text contains {name!r}, which this tokenizer can only write as the special id {i}; "
          "take it out of the text or use a byte-level tokenizer"
        )
    return ids


# --- making, finding, saving ---------------------------------------------------------------------


def make_tokenizer(
  spec: str,
  texts: Sequence[str] = (),
  *,
  mask_token: str | None = None,
  eos_token: str | None = None,
  pad_token: str | None = None,
) -> Tokenizer:
  """`bytes`, `bpe:<vocabulary>` trained on `texts` and cached, or a `tokenizer.json` by path.

  Args:
    spec: as above; a path is a file, or a folder with `tokenizer.json` in it.
    texts: training text of a BPE: give it no held-out text.
    mask_token, eos_token, pad_token: names of special tokens in a `tokenizer.json`, where they are
      not among `MASK_NAMES`, `EOS_NAMES`, `PAD_NAMES`.

  Raises:
    FileNotFoundError: if the spec is a path and nothing is there.
    ValueError: for a malformed spec or special token.
  """
  if spec == "bytes":
    return Bytes()
  if spec.startswith("bpe:"):
    size = spec.removeprefix("bpe:")
    if not size.isdecimal():
      raise ValueError(f"tokenizer {spec!r}: a vocabulary size is expected, e.g. 'bpe:4096'")
    return cached_bpe(texts, int(size))
  path = epath.Path(spec)
  if (path / _DESCRIPTION).exists():
    return load_tokenizer(path)
  path = path / _VOCABULARY if path.is_dir() else path
  if not path.exists():
    raise FileNotFoundError(
      f"tokenizer {spec!r}: neither 'bytes' nor 'bpe:<vocabulary>', and no file {path}"
    )
  return read_tokenizer_json(path, mask_token=mask_token, eos_token=eos_token, pad_token=pad_token)


def train_bpe(texts: Sequence[str], vocab_size: int) -> JsonTokenizer:
  """A byte-level BPE: `<|endoftext|>` (also padding) is 0, `<|mask|>` is 1, then bytes and merges.

  The vocabulary is smaller than asked where the text has too few pairs to merge.

  Raises:
    ValueError: if `vocab_size` is below 258 (256 bytes and two special tokens), or without text.
  """
  smallest = 256 + 2
  if vocab_size < smallest:
    raise ValueError(
      f"a byte-level BPE needs a vocabulary of at least {smallest}, got {vocab_size}"
    )
  if not any(texts):
    raise ValueError(f"no text to train a BPE of {vocab_size} on")
  engine = tokenizers.Tokenizer(models.BPE())
  engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  engine.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS_TOKEN, MASK_TOKEN],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  engine.train_from_iterator(texts, trainer, length=len(texts))
  tokenizer = _settle(engine, MASK_TOKEN, EOS_TOKEN, EOS_TOKEN)
  if tokenizer.vocab_size < vocab_size:
    logging.warning(
      "the text has pairs for a BPE of %d only, not %d", tokenizer.vocab_size, vocab_size
    )
  return tokenizer


def cache_dir() -> pathlib.Path:
  """`$LLADAX_CACHE`, else `~/.cache/lladax`."""
  return pathlib.Path(os.environ.get("LLADAX_CACHE") or "~/.cache/lladax").expanduser()


def cached_bpe(texts: Sequence[str], vocab_size: int) -> JsonTokenizer:
  """`train_bpe`, remembered in `cache_dir()` under the hash of text and vocabulary size."""
  digest = hashlib.sha256(f"{_BPE_RECIPE} {vocab_size}".encode())
  for text in texts:
    content = text.encode()
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)
  path = cache_dir() / f"bpe-{digest.hexdigest()[:20]}.json"
  if path.exists():
    try:
      return read_tokenizer_json(path, mask_token=MASK_TOKEN, eos_token=EOS_TOKEN)
    except ValueError as error:
      logging.warning("training the BPE again: %s", error)
  tokenizer = train_bpe(texts, vocab_size)
  try:
    _write_whole(path, tokenizer.engine.to_str())
  except OSError as error:
    logging.warning("the BPE is not cached: %s", error)
  return tokenizer


def read_tokenizer_json(
  path: str | os.PathLike,
  *,
  mask_token: str | None = None,
  eos_token: str | None = None,
  pad_token: str | None = None,
) -> JsonTokenizer:
  """A tokenizer from its `tokenizer.json`, with special tokens found by name.

  MASK or end of text that the vocabulary lacks is appended after its last id and logged; padding
  falls back on end of text.

  Raises:
    ValueError: if the file is no tokenizer, lacks a special token asked for by name, or has no free
      id for one to be appended.
  """
  content = epath.Path(path).read_text()
  try:
    engine = tokenizers.Tokenizer.from_str(content)
  except Exception as error:  # the library raises a bare Exception
    raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
  mask = _find_special(engine, "mask_token", mask_token, MASK_NAMES)
  eos = _find_special(engine, "eos_token", eos_token, EOS_NAMES)
  pad = _find_special(engine, "pad_token", pad_token, PAD_NAMES)
  for name, found in ((MASK_TOKEN, mask), (EOS_TOKEN, eos)):
    if found is None:
      logging.info("%s has no token like %s: appended", path, name)
  eos = eos or EOS_TOKEN
  return _settle(engine, mask or MASK_TOKEN, eos, pad or eos)


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
  """What `Tokenizer.save` wrote; a folder with only a `tokenizer.json` is read by names.

  Raises:
    FileNotFoundError: if there is no tokenizer in the folder.
    ValueError: if it is unreadable.
  """
  directory = epath.Path(directory)
  vocabulary, path = directory / _VOCABULARY, directory / _DESCRIPTION
  if not path.exists():
    if not vocabulary.exists():
      raise FileNotFoundError(f"no tokenizer in {directory}: no {_DESCRIPTION}, no {_VOCABULARY}")
    return read_tokenizer_json(vocabulary)
  try:
    description = json.loads(path.read_text())
    kind = description.pop("kind")
  except (ValueError, KeyError, AttributeError) as error:
    raise ValueError(f"{path} does not describe a tokenizer: {error!r}") from None
  if kind == "bytes":
    return Bytes()
  if kind == "json":
    return read_tokenizer_json(vocabulary, **description)
  raise ValueError(f"{path}: unknown kind of tokenizer {kind!r}; known: 'bytes', 'json'")


def encode_with_masks(tokenizer: Tokenizer, text: str, mask: str = MASK_TOKEN) -> list[int]:
  """Ids of text in which every `mask` stands for one MASK to be filled."""
  first, *others = (tokenizer.encode(part) for part in text.split(mask))
  return first + [i for part in others for i in (tokenizer.mask_id, *part)]


def _find_special(
  engine: tokenizers.Tokenizer, role: str, asked: str | None, names: tuple[str, ...]
) -> str | None:
  if asked is not None and engine.token_to_id(asked) is None:
    known = [token.content for token in engine.get_added_tokens_decoder().values()]
    raise ValueError(f"{role} {asked!r} is not in the vocabulary; added tokens: {known[:50]}")
  if asked is not None:
    return asked
  return next((name for name in names if engine.token_to_id(name) is not None), None)


def _settle(engine: tokenizers.Tokenizer, mask: str, eos: str, pad: str) -> JsonTokenizer:
  engine.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t in (eos, mask, pad)]
  )
  engine.encode_special_tokens = True  # text that spells a special token stays text
  engine.no_padding()
  engine.no_truncation()
  # The library numbers new tokens by the size of the vocabulary, which may have holes below it.
  others = engine.get_vocab(with_added_tokens=False)
  others = {i: token for token, i in others.items() if token not in (mask, eos, pad)}
  for token in (mask, eos, pad):
    if (i := engine.token_to_id(token)) in others:
      raise ValueError(
        f"{token!r} would get id {i}, which is {others[i]!r} in this vocabulary with holes; add "
        "the special token to its tokenizer.json with a free id"
      )
  return JsonTokenizer(engine, mask, eos, pad)


def _check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
  ids = np.asarray(ids, np.int64).reshape(-1)
  bad = ids[(ids < 0) | (ids >= vocab_size)]
  if bad.size:
    raise ValueError(f"id {bad[0]} is outside the vocabulary of {vocab_size}")
  return ids.tolist()


def _write_description(directory: str | os.PathLike, description: dict[str, str]) -> None:
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / _DESCRIPTION).write_text(json.dumps(description) + "\n")


def _write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file that other processes see whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
  try:
    with os.fdopen(handle, "w", encoding="utf-8") as file:
      file.write(text)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise
