"""Rows on disk: ArrayRecord files whose records are packed rows, read at random.

A record is little-endian: the number of segments and the length of each (uint32), then the tokens
of the segments (uint16 where the vocabulary allows, else uint32). Padding is not stored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lladax.data.transforms import Rows

# One record a chunk: a row is read without its neighbours.
_WRITER_OPTIONS = "group_size:1,zstd:1"
# Files that are kept open at a time by a reader.
_OPEN_FILES = 256


class ShardError(ValueError):
  """A shard is missing, damaged, or not what its manifest says."""


def token_type(vocab_size: int) -> np.dtype:
  """What a token is stored as."""
  return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def encode_row(tokens: np.ndarray, lengths: Sequence[int], dtype: np.dtype) -> bytes:
  """A record of a row: int[n] tokens of its segments, and the length of each."""
  return np.array([len(lengths), *lengths], "<u4").tobytes() + tokens.astype(dtype).tobytes()


def decode_row(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
  """int32[n] tokens and int64[segments] lengths of a record.

  Raises:
    ValueError: if it is no row.
  """
  if len(record) < 4:
    raise ValueError(f"a record of {len(record)} bytes is no row")
  start = 4 * (1 + int(np.frombuffer(record, "<u4", 1)[0]))
  if len(record) < start or (len(record) - start) % dtype.itemsize:
    raise ValueError(f"a record of {len(record)} bytes is no row of {dtype.itemsize}-byte tokens")
  lengths = np.frombuffer(record[4:start], "<u4").astype(np.int64)
  tokens = np.frombuffer(record[start:], dtype).astype(np.int32)
  if lengths.sum() != len(tokens) or (lengths == 0).any():
    raise ValueError(f"segments of {lengths.sum()} tokens in a row that holds {len(tokens)}")
  return tokens, lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """What the manifest says of a file of rows.

  Attributes:
    name: of the file, within the folder of the manifest.
    rows: records.
    tokens: of text, the ends of documents included.
    padding: places without text.
    segments: pieces of documents; as many as documents where none was cut.
    documents: of the unit of work that wrote it.
    text_bytes: of the documents, in UTF-8.
    size: bytes of the file.
    sha256: of the file.
  """

  name: str
  rows: int
  tokens: int
  padding: int
  segments: int
  documents: int
  text_bytes: int
  size: int
  sha256: str


def file_sha256(path: os.PathLike) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
  """Writes a shard under another name, and gives it its own when it is whole."""

  def __init__(self, path: pathlib.Path, *, length: int, dtype: np.dtype):
    self._path, self._length, self._dtype = path, length, dtype
    # Two processes never write the same file.
    self._unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    self._writer: ArrayRecordWriter | None = None
    self._rows = self._tokens = self._segments = 0

  def write(self, tokens: np.ndarray, lengths: Sequence[int]):
    if self._writer is None:
      self._writer = ArrayRecordWriter(str(self._unfinished), _WRITER_OPTIONS)
    self._writer.write(encode_row(tokens, lengths, self._dtype))
    self._rows += 1
    self._tokens += len(tokens)
    self._segments += len(lengths)

  def close(self, **counts: int) -> Shard | None:
    """The shard, with these counts besides its own; None without rows."""
    if self._writer is None:
      return None
    self._writer.close()
    self._writer = None
    sha256, size = file_sha256(self._unfinished), self._unfinished.stat().st_size
    os.replace(self._unfinished, self._path)
    return Shard(
      name=self._path.name,
      rows=self._rows,
      tokens=self._tokens,
      padding=self._rows * self._length - self._tokens,
      segments=self._segments,
      size=size,
      sha256=sha256,
      **counts,
    )

  def discard(self):
    if self._writer is not None:
      self._writer.close()
    self._unfinished.unlink(missing_ok=True)


class ShardReader:
  """The rows of several shards by number, in the order of the shards.

  Reads may come from several threads.

  Args:
    folder: where they lie.
    shards: as in the manifest.
    length: L.
    vocab_size: of their tokens.
    pad_id: token of padding.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    shards: Sequence[Shard],
    *,
    length: int,
    vocab_size: int,
    pad_id: int,
  ):
    self._folder, self._shards = folder, tuple(shards)
    self._length, self._vocab_size, self._pad_id = length, vocab_size, pad_id
    self._dtype = token_type(vocab_size)
    self._ends = np.cumsum([shard.rows for shard in self._shards], dtype=np.int64)
    self._reader = functools.lru_cache(maxsize=_OPEN_FILES)(self._open)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def read(self, index: np.ndarray) -> Rows:
    """Rows by number, [R, L]; -1 is an empty row.

    Raises:
      ShardError: for a damaged record; names shard and row.
    """
    shape = (len(index), self._length)
    rows = Rows(np.full(shape, self._pad_id, np.int32), *np.zeros((2, *shape), np.int32))
    for place, number in enumerate(index):
      if number < 0:
        continue
      tokens, lengths = self._row(int(number))
      count = len(tokens)
      rows.tokens[place, :count] = tokens
      rows.segment_ids[place, :count] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
      starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
      rows.positions[place, :count] = np.arange(count) - starts
    return rows

  def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    which = int(np.searchsorted(self._ends, number, side="right"))
    inside = number - int(self._ends[which]) + self._shards[which].rows
    try:
      tokens, lengths = decode_row(self._reader(which).read([inside])[0], self._dtype)
      if len(tokens) > self._length:
        raise ValueError(f"{len(tokens)} tokens in a row of {self._length}")
      if len(tokens) and tokens.max() >= self._vocab_size:
        raise ValueError(f"token id {tokens.max()} in a vocabulary of {self._vocab_size}")
    except (RuntimeError, ValueError, IndexError) as error:
      reason = " ".join(str(error).split())
      raise ShardError(
        f"{self._folder / self._shards[which].name}: row {inside} is damaged ({reason}); "
        f"`python -m lladax.data verify {self._folder}` checks all of them"
      ) from error
    return tokens, lengths

  def _open(self, which: int) -> ArrayRecordReader:
    return open_shard(self._folder / self._shards[which].name)


def open_shard(path: pathlib.Path) -> ArrayRecordReader:
  """A reader that fetches no more than the record asked for."""
  return ArrayRecordReader(str(path), options="readahead_buffer_size:0")


def check_shard(folder: pathlib.Path, shard: Shard):
  """Makes sure that a shard is there and has the size and rows of its manifest, reading little.

  Raises:
    ShardError: names the file and what is wrong.
  """
  path = folder / shard.name
  try:
    size = path.stat().st_size
  except FileNotFoundError:
    raise ShardError(f"shard {path} is missing; copy it again or prepare the folder anew") from None
  if size != shard.size:
    raise ShardError(
      f"shard {path} has {size} bytes, its manifest says {shard.size}; copy it again"
    )
  try:
    rows = open_shard(path).num_records()
  except RuntimeError as error:
    raise ShardError(f"shard {path} is damaged: {' '.join(str(error).split())}") from error
  if rows != shard.rows:
    raise ShardError(f"shard {path} has {rows} rows, its manifest says {shard.rows}")
