"""Where weights come from: a folder or a hub id, and what is remembered of it for the way back."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from lladax.hub.reader import Folder, FolderError

# What is fetched from a hub, and what an export carries along: data, never code.
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
SIDE_FILES = (
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.jinja",
  "chat_template.json",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """What an export needs to write the folder again, byte for byte.

  Attributes:
    path: the folder that was read; its tokenizer files are copied from there.
    family: name of the family.
    config: content of config.json.
    dtypes: by tensor, in the order of the files.
    files: shard of every tensor.
    metadata: of the shards' headers.
  """

  path: str
  family: str
  config: Mapping[str, Any]
  dtypes: Mapping[str, str]
  files: Mapping[str, str]
  metadata: Mapping[str, str]

  def to_tree(self) -> dict[str, Any]:
    """As JSON values."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def source_of(folder: Folder, family: str) -> Source:
  return Source(
    path=str(folder.path),
    family=family,
    config=folder.config,
    dtypes={name: tensor.dtype for name, tensor in folder.tensors.items()},
    files={name: tensor.file for name, tensor in folder.tensors.items()},
    metadata=dict(folder.metadata),
  )


def find(path_or_id: str | os.PathLike) -> pathlib.Path:
  """The folder itself, or the downloaded one of a hub id like "org/name".

  Raises:
    FolderError: if there is no such folder and it is no hub id, or the hub does not have it.
  """
  path = pathlib.Path(path_or_id).expanduser()
  if path.is_dir():
    return path
  name = os.fspath(path_or_id)
  if not _HUB_ID.fullmatch(name) or name.startswith("."):
    raise FolderError(f"there is no folder {name!r}, and it is not a hub id like 'org/name'")
  try:
    import huggingface_hub
  except ImportError:
    raise FolderError(
      f"there is no folder {name!r}; to fetch it from the hub: pip install 'lladax[hub]'"
    ) from None
  patterns = ["config.json", *SIDE_FILES, *WEIGHT_PATTERNS]
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
  except Exception as error:  # connection, permission, unknown id: each of its own class
    reason = " ".join(str(error).split())[:300]
    raise FolderError(
      f"there is no folder {name!r}, and the hub does not give it ({type(error).__name__}: "
      f"{reason}); check the name, or download the folder and pass its path"
    ) from error
