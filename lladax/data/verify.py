"""Prepared text looked at: `inspect` prints its manifest and some rows, `verify` reads all of it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from lladax.data.manifest import SIDES, Manifest, read_manifest, read_tokenizer
from lladax.data.shards import (
  Shard,
  ShardError,
  ShardReader,
  check_shard,
  decode_row,
  file_sha256,
  open_shard,
  token_type,
)
from lladax.data.tokenizer import Tokenizer


def open_side(
  folder: pathlib.Path, manifest: Manifest, side: str, tokenizer: Tokenizer
) -> ShardReader:
  """The rows of a side, "train" or "heldout"."""
  return ShardReader(
    folder,
    getattr(manifest, side),
    length=manifest.length,
    vocab_size=tokenizer.vocab_size,
    pad_id=tokenizer.pad_id,
  )


def describe(folder: pathlib.Path, *, rows: int = 3, side: str = "train") -> Iterator[str]:
  """Lines for people: the manifest as a table, and rows spread over a side as text."""
  manifest = read_manifest(folder)
  tokenizer = read_tokenizer(folder, manifest)
  yield from _table(manifest)
  reader = open_side(folder, manifest, side, tokenizer)
  for number in np.linspace(0, len(reader) - 1, min(rows, len(reader))).astype(int):
    row = reader.read(np.array([number]))
    segments = row.segment_ids[0]
    yield f"\n{side} row {number}: {segments.max()} segments, {(segments > 0).sum()} tokens"
    for segment in range(1, segments.max() + 1):
      text = tokenizer.decode(row.tokens[0][segments == segment], skip_special=False)
      yield f"  {segment}: {text if len(text) <= 160 else text[:120] + ' ... ' + text[-35:]!r}"


def _table(manifest: Manifest) -> Iterator[str]:
  names = ("shards", "documents", "text_bytes", "tokens", "rows", "padding", "segments", "size")
  yield f"{'':12}{'train':>20}{'heldout':>20}"
  for name in names:
    values = [
      len(getattr(manifest, side)) if name == "shards" else manifest.total(name, side)
      for side in SIDES
    ]
    yield f"{name:12}" + "".join(f"{value:>20,}" for value in values)
  tokenizer = manifest.tokenizer
  yield f"length      {manifest.length}"
  yield (
    f"tokenizer   {tokenizer['spec']}, vocabulary {tokenizer['vocab_size']}, "
    f"sha256 {tokenizer['sha256'][:16]}"
  )
  for source in manifest.sources:
    size = sum(file.get("size", 0) for file in source["files"])
    yield f"source      {source['name']}: {len(source['files'])} files, {size:,} bytes"
  yield f"key         {manifest.key}"


def verify(
  folder: pathlib.Path, show: Callable[[int, int], object] = lambda done, total: None
) -> list[str]:
  """What is wrong with a prepared folder, one line each; none if nothing is.

  Every byte of every shard is hashed, and every row decoded: its length, its ids, and that rows,
  segments and tokens are as many as the manifest says.

  Args:
    show: called with the shards done and their number.

  Raises:
    FileNotFoundError, ValueError: without a manifest, or with a damaged one.
  """
  manifest = read_manifest(folder)
  problems = []
  try:
    read_tokenizer(folder, manifest)
  except (ValueError, FileNotFoundError) as error:
    problems.append(str(error))
  shards = [*manifest.train, *manifest.heldout]
  for done, shard in enumerate(shards):
    show(done, len(shards))
    problems += _problems(folder, shard, manifest)
  show(len(shards), len(shards))
  return problems


def _problems(folder: pathlib.Path, shard: Shard, manifest: Manifest) -> Iterator[str]:
  path = folder / shard.name
  try:
    check_shard(folder, shard)
  except ShardError as error:
    yield str(error)
    return
  if file_sha256(path) != shard.sha256:
    yield f"{path}: its bytes are not those that were written (sha256)"
  dtype = token_type(manifest.tokenizer["vocab_size"])
  reader, tokens, segments = open_shard(path), 0, 0
  for row in range(shard.rows):
    try:
      ids, lengths = decode_row(reader.read([row])[0], dtype)
    except (RuntimeError, ValueError) as error:
      yield f"{path}: row {row}: {' '.join(str(error).split())}"
      continue
    tokens, segments = tokens + len(ids), segments + len(lengths)
    yield from (f"{path}: row {row}: {problem}" for problem in _row_problems(ids, manifest))
  if (tokens, segments) != (shard.tokens, shard.segments):
    yield (
      f"{path}: {tokens} tokens in {segments} segments, its manifest says {shard.tokens} in "
      f"{shard.segments}"
    )


def _row_problems(ids: np.ndarray, manifest: Manifest) -> Iterator[str]:
  if not 0 < len(ids) <= manifest.length:
    yield f"{len(ids)} tokens, and rows have 1 to {manifest.length}"
  if len(ids) and not 0 <= ids.min() <= ids.max() < manifest.tokenizer["vocab_size"]:
    yield f"token id {ids.max()} in a vocabulary of {manifest.tokenizer['vocab_size']}"
  if (ids == manifest.tokenizer["mask_id"]).any():
    yield "the text holds MASK"
