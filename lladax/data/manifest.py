"""The manifest of prepared text: what was read, how it became rows, and what every shard holds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from lladax.data.shards import Shard
from lladax.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"  # while the folder is being prepared
TOKENIZER = "tokenizer"
SAMPLE = "sample.json"  # beside a tokenizer that was trained here: on how much text
SIDES = ("train", "heldout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """A folder of prepared text.

  Attributes:
    recipe: how it was made, as a tree of JSON values; see `lladax.data.prepare.Recipe`.
    sources: name of each source, and its files with size and sha256.
    tokenizer: sha256, vocab_size and special ids; a trained one says how much text it saw.
    length: L.
    train, heldout: the shards of each side, in order.
    format: version of this layout.
  """

  recipe: dict[str, Any]
  sources: list[dict[str, Any]]
  tokenizer: dict[str, Any]
  length: int
  train: tuple[Shard, ...]
  heldout: tuple[Shard, ...]
  format: int = FORMAT

  def total(self, name: str, side: str) -> int:
    """Sum of a field of the shards of a side."""
    return sum(getattr(shard, name) for shard in getattr(self, side))

  @functools.cached_property
  def key(self) -> str:
    """Tells the training rows, their order and their tokenizer from any others."""
    return self.key_of("train")

  def key_of(self, side: str) -> str:
    """As `key`, of either side."""
    digest = hashlib.sha256(f"{self.length} {self.tokenizer['sha256']}".encode())
    for shard in getattr(self, side):
      digest.update(shard.sha256.encode())
    return digest.hexdigest()[:16]

  def write(self, folder: pathlib.Path):
    """Writes `manifest.json`, with the totals for people who look into it."""
    tree = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    for side in SIDES:
      tree[side] = [dataclasses.asdict(shard) for shard in tree[side]]
    counts = ("rows", "documents", "tokens", "padding", "text_bytes")
    totals = {side: {name: self.total(name, side) for name in counts} for side in SIDES}
    write_json(folder / MANIFEST, {"format": tree.pop("format"), "totals": totals, **tree})


def read_manifest(folder: str | os.PathLike) -> Manifest:
  """The manifest of a prepared folder.

  Raises:
    FileNotFoundError: if there is none; where a prepare was not finished, with the command that
      finishes it.
    ValueError: if it is damaged or of another format.
  """
  folder = pathlib.Path(folder).expanduser()
  path = folder / MANIFEST
  if not path.exists():
    if (folder / PLAN).exists():
      command = json.loads((folder / PLAN).read_text()).get("command", "the same command")
      raise FileNotFoundError(f"{folder} was not prepared to the end; finish it with: {command}")
    what = "no prepared text in it (no manifest.json)" if folder.exists() else "does not exist"
    raise FileNotFoundError(
      f"{folder}: {what}; `python -m lladax.data prepare --target={folder} --source=...` makes it"
    )
  try:
    tree = json.loads(path.read_text())
    tree.pop("totals")
    if tree["format"] != FORMAT:
      raise ValueError(f"format {tree['format']}, and this version of lladax reads {FORMAT}")
    for side in SIDES:
      tree[side] = tuple(Shard(**shard) for shard in tree[side])
    return Manifest(**tree)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is not a manifest that can be read: {error}") from None


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
  """What a manifest says of a tokenizer; equal for equal ones."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    sha256 = _tokenizer_sha256(pathlib.Path(folder))
  ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "pad")}
  return {"sha256": sha256, "vocab_size": tokenizer.vocab_size, **ids}


def _tokenizer_sha256(folder: pathlib.Path) -> str:
  digest = hashlib.sha256()
  for path in sorted(folder.iterdir()):
    if path.name != SAMPLE:
      content = path.read_bytes()
      digest.update(f"{path.name} {len(content)} ".encode() + content)
  return digest.hexdigest()


def read_tokenizer(folder: pathlib.Path, manifest: Manifest) -> Tokenizer:
  """The copy in a prepared folder.

  Raises:
    ValueError, FileNotFoundError: if it is not there, or not the one that made the rows.
  """
  tokenizer = load_tokenizer(folder / TOKENIZER)
  # Of the files: another version of the library may write the same tokenizer in another way.
  if _tokenizer_sha256(folder / TOKENIZER) != manifest.tokenizer["sha256"]:
    raise ValueError(
      f"the tokenizer in {folder / TOKENIZER} is not the one its rows were made with; copy it again"
    )
  return tokenizer


def write_json(path: pathlib.Path, tree: Any):
  """A file that is there whole or not at all."""
  new = path.with_name(f".{path.name}.{os.getpid()}")
  new.write_text(json.dumps(tree, indent=1) + "\n")
  os.replace(new, path)


def shard_tree(shards: Sequence[Shard | None]) -> list[dict[str, Any]]:
  """Shards as JSON, those without rows left out."""
  return [dataclasses.asdict(shard) for shard in shards if shard is not None]
