"""Parameters to a Hugging Face folder that the torch world loads: the import, backwards.

Sizes and offsets of all tensors are known before the first is written, so every shard is laid out
at once and each layer of each parameter is brought to the host, written to its places and let go.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lladax.data import Tokenizer
from lladax.hub.card import model_card
from lladax.hub.chat import ChatTemplate
from lladax.hub.families import FAMILIES, Family, family_for
from lladax.hub.folder_tokenizer import write_folder_tokenizer
from lladax.hub.layout import Layout, lay_out, write_headers
from lladax.hub.mapping import Row
from lladax.hub.plan import abstract, contiguous, named_leaves, tensor_shapes
from lladax.hub.reader import CONFIG_FILE, DTYPES, open_folder, some
from lladax.hub.source import SIDE_FILES, Source
from lladax.models import ModelConfig

FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
CARD_FILE = "README.md"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"


class ExportError(ValueError):
  """A model that cannot be written as asked; nothing was written."""


def save_folder(
  path: str | os.PathLike,
  *,
  config: ModelConfig,
  params: Any,
  family: Family | None = None,
  tokenizer: Tokenizer | None = None,
  template: ChatTemplate | None = None,
  source: Source | None = None,
  card: str | None = None,
  max_shard_size: int = 5_000_000_000,
  dtype: str | None = None,
) -> pathlib.Path:
  """Writes a folder with config.json, safetensors, tokenizer and model card.

  It gets its name when everything is in it.

  Args:
    path: the folder to make.
    config: the architecture.
    params: the parameters; they may be sharded over the devices of this process.
    family: whose names to use; None: the source's, else the one that has models of this config.
    tokenizer: written where the source brings none.
    template: of chats, written with the tokenizer.
    source: of an imported model. Names, dtypes, shards and config.json are then as they were
      there, and its tokenizer files are copied.
    card: text of README.md; None: a card of the config for a model without a source.
    max_shard_size: bytes; a tensor is never split.
    dtype: of the tensors, "float32", "bfloat16" or "float16"; None: the source's, else
      `config.param_dtype`.

  Returns:
    The path.

  Raises:
    ExportError: if the folder exists, or the parameters are not those of the config or source.
    ValueError: if no family has a model of this config.
  """
  path = pathlib.Path(path).expanduser()
  if path.exists():
    raise ExportError(f"{path} exists; choose another name, or remove it")
  if dtype not in (None, *FORMAT_NAMES):
    raise ExportError(f"dtype {dtype!r}: expected one of {', '.join(FORMAT_NAMES)}")
  family = family or (family_for(config) if source is None else _family_named(source.family))
  leaves = named_leaves(params)
  _require_params(config, leaves)
  names = () if source is None else source.dtypes.keys()
  rows = family.rows(config, names)
  shapes = tensor_shapes(rows, leaves)
  if source is not None and (different := set(shapes) ^ set(names)):
    raise ExportError(
      f"the model is not the one read from {source.path}, tensors differ: {some(sorted(different))};"
      " leave the source out to export it as a model of its own"
    )
  hf_config = dict(family.hf_config(config) if source is None else source.config)
  if source is None or dtype is not None:
    hf_config["torch_dtype"] = dtype or config.param_dtype
    hf_config.pop("dtype", None)
  layout = lay_out(
    shapes, _tensor_dtypes(rows, source, dtype or config.param_dtype, dtype is not None),
    max_shard_size, files=None if source is None or dtype is not None else source.files,
  )  # fmt: skip
  metadata = {"format": "pt"} if source is None else dict(source.metadata)
  with whole_folder(path) as folder:
    _write_json(folder / CONFIG_FILE, hf_config)
    layout = write_headers(folder, layout, metadata)
    _write_tensors(folder, layout, rows, leaves)
    _write_side_files(folder, config, tokenizer, template, source)
    if card is None and source is None:
      card = model_card(config, name=path.name, family=family.name)
    if card is not None:
      (folder / CARD_FILE).write_text(card, encoding="utf-8")
    open_folder(folder)
  return path


@contextlib.contextmanager
def whole_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder beside `path` that becomes `path` at the end, or vanishes with an exception."""
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
  try:
    yield folder
    folder.chmod(0o777 & ~_umask())  # mkdtemp's folder is for its owner alone
    os.rename(folder, path)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def _family_named(name: str) -> Family:
  found = next((family for family in FAMILIES if family.name == name), None)
  if found is None:
    known = ", ".join(family.name for family in FAMILIES)
    raise ExportError(f"the source is of family {name!r}; known are {known}")
  return found


def _require_params(config: ModelConfig, leaves: Mapping[str, Any]):
  expected = named_leaves(abstract(config))
  wrong = [
    f"{path}: {list(np.shape(leaves[path])) if path in leaves else 'none'}, "
    f"{list(expected[path].shape) if path in expected else 'none'} by the config"
    for path in {**expected, **leaves}
    if path not in leaves or path not in expected or np.shape(leaves[path]) != expected[path].shape
  ]
  if wrong:
    raise ExportError(f"the parameters are not those of the config: {some(wrong)}")
  away = [path for path, x in leaves.items() if not getattr(x, "is_fully_addressable", True)]
  if away:
    raise ExportError(
      f"{some(away)}: spread over several processes; load the checkpoint in one process to export"
    )


def _tensor_dtypes(
  rows: tuple[Row, ...], source: Source | None, default: str, forced: bool
) -> dict[str, str]:
  """Dtype of every tensor by the format's names."""
  if source is not None and not forced:
    return dict(source.dtypes)
  return {
    name: FORMAT_NAMES[row.dtype or default]
    for row in rows
    for _, _, names in row.names()
    for name in names
  }


def _write_tensors(
  folder: pathlib.Path, layout: Layout, rows: tuple[Row, ...], leaves: Mapping[str, Any]
):
  with contextlib.ExitStack() as stack:
    files = {
      file: stack.enter_context(open(folder / file, "r+b", buffering=0)) for file in layout.files
    }
    for name, tensor in named_tensors(rows, leaves):
      place = layout.tensors[name]
      file = files[place.file]
      file.seek(place.start)
      _write_all(file, _as_stored(tensor, DTYPES[place.dtype]))


def named_tensors(
  rows: Sequence[Row], leaves: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor of the rows with its name there; one layer of a row is on the host at a time.

  Args:
    rows: of a `Family`, or of `lladax.hub.names`.
    leaves: parameters by path (`named_leaves`).
  """
  for row in rows:
    at, slices = None, ()
    for layer, expert, names in row.names():
      if not slices or layer != at:
        at, slices = layer, [_to_host(leaves[path], layer) for path in row.params]
      visit = [x if expert is None else x[expert] for x in slices]
      yield from zip(names, row.to_tensors(visit), strict=True)


def _to_host(param: Any, layer: int | None) -> np.ndarray:
  return np.asarray(param if layer is None else param[layer])


def _as_stored(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Contiguous bytes of the tensor in that dtype."""
  tensor = contiguous(tensor.astype(dtype, copy=False))
  return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)


def _write_all(file, array: np.ndarray):
  view = memoryview(array)
  while len(view):
    view = view[file.write(view) :]


# --- Small files ---


def _write_side_files(
  folder: pathlib.Path,
  config: ModelConfig,
  tokenizer: Tokenizer | None,
  template: ChatTemplate | None,
  source: Source | None,
):
  """Tokenizer and generation settings: the source's, else our own."""
  if source is not None:
    for name in SIDE_FILES:
      if (file := pathlib.Path(source.path) / name).is_file():
        shutil.copyfile(file, folder / name)
    if tokenizer is None or (folder / TOKENIZER_FILE).exists():
      return
  else:
    ids = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    _write_json(folder / GENERATION_FILE, {k: v for k, v in ids.items() if v is not None})
  if tokenizer is not None:
    length = config.max_position_embeddings
    write_folder_tokenizer(folder, tokenizer, template=template, max_length=length)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]):
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
