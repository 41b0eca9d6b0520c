"""Sources of text cut into units of work: each is read on its own, in the same way every time.

A unit is a list of pieces: a byte range of a JSON Lines file (the lines that begin in it), row
groups of a Parquet file, a range of records, or whole files where a format cannot be entered.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from array_record.python.array_record_module import ArrayRecordReader

from lladax.data.corpora import (
  JSON_SUFFIXES,
  TEXT_SUFFIXES,
  Document,
  find_files,
  load_corpus,
  load_hub,
  open_parquet,
  text_of,
)

COMPRESSED = (".gz", ".zst")
RECORD_SUFFIXES = (".array_record", ".arrayrecord")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet", *RECORD_SUFFIXES)
BUNDLED = ("shakespeare", "python")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """How text is taken from files.

  Attributes:
    text_field: the field of JSON objects, or the column of tables, that holds the text.
    separator: cuts text files into documents.
    records: what an ArrayRecord record is: a JSON object ("json") or UTF-8 text ("text").
  """

  text_field: str = "text"
  separator: str | None = None
  records: str = "json"

  def __post_init__(self):
    if self.records not in ("json", "text"):
      raise ValueError(f"records hold 'json' or 'text', got {self.records!r}")


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a source that can be read alone.

  Attributes:
    kind: "lines", "text", "parquet", "records", "hub" or "bundled".
    path: of the file; the name of the source for "hub" and "bundled".
    first, last: bytes, row groups, records or rows, the last one not included; None: all.
    size: bytes, about.
  """

  kind: str
  path: str
  first: int | None
  last: int | None
  size: int


Unit = tuple[Piece, ...]

# Bytes of text that are decoded at a time.
_BLOCK = 1 << 22


def find_pieces(source: str, unit_bytes: int) -> list[Piece]:
  """The pieces of a source in a fixed order.

  Args:
    source: a file, pattern or folder; `hf:<id>`; `shakespeare` or `python`.
    unit_bytes: files that can be entered are cut into pieces of about this size.

  Raises:
    FileNotFoundError, ModuleNotFoundError, ValueError: see `load_corpus`.
  """
  if source in BUNDLED:
    documents = load_corpus(source)
    return [Piece("bundled", source, None, None, sum(d.num_bytes for d in documents))]
  if source.startswith("hf:"):
    dataset = _hub(source)
    size = getattr(dataset, "size_in_bytes", None) or 1024 * len(dataset)
    count = max(1, -(-size // unit_bytes))
    return _ranges("hub", source, len(dataset), count, size)
  files = find_files(source, SUFFIXES, suffix_of=_suffix)
  return [piece for path in files for piece in _pieces_of_file(path, unit_bytes)]


def group_units(pieces: Sequence[Piece], unit_bytes: int) -> list[Unit]:
  """Neighbouring pieces together, up to `unit_bytes`; a larger piece alone."""
  units, unit, size = [], [], 0
  for piece in pieces:
    if unit and size + piece.size > unit_bytes:
      units.append(tuple(unit))
      unit, size = [], 0
    unit.append(piece)
    size += piece.size
  if unit:
    units.append(tuple(unit))
  return units


def read_unit(unit: Unit, reading: Reading) -> Iterator[Document]:
  """Its documents in order, empty ones too.

  Raises:
    ValueError: for text that is not UTF-8, a line that is not JSON, a missing field; names the file
      and line.
  """
  for piece in unit:
    yield from _READERS[piece.kind](piece, reading)


def _suffix(path: pathlib.Path) -> str:
  """The suffix that tells the format, in lower case; compression left out."""
  name = path.name.lower()
  for ending in COMPRESSED:
    name = name.removesuffix(ending)
  return pathlib.PurePath(name).suffix


def _is_compressed(path: pathlib.Path) -> bool:
  return path.suffix.lower() in COMPRESSED


def _pieces_of_file(path: pathlib.Path, unit_bytes: int) -> list[Piece]:
  size, suffix, name = path.stat().st_size, _suffix(path), str(path)
  if suffix in JSON_SUFFIXES:
    if _is_compressed(path):
      return [Piece("lines", name, None, None, size)]
    starts = range(0, size, unit_bytes)
    return [Piece("lines", name, at, min(at + unit_bytes, size), min(unit_bytes, size - at))
            for at in starts]  # fmt: skip
  if suffix == ".parquet":
    return _row_groups(path, unit_bytes)
  if suffix in RECORD_SUFFIXES:
    count = ArrayRecordReader(name).num_records()
    if not count and size:
      raise ValueError(f"{path} is not an ArrayRecord file, or a damaged one")
    return _ranges("records", name, count, max(1, -(-size // unit_bytes)), size)
  return [Piece("text", name, None, None, size)]


def _ranges(kind: str, path: str, total: int, count: int, size: int) -> list[Piece]:
  """`total` records in `count` ranges."""
  cuts = [total * i // count for i in range(count + 1)]
  return [Piece(kind, path, a, b, size // count) for a, b in zip(cuts, cuts[1:], strict=False)
          if a < b]  # fmt: skip


def _row_groups(path: pathlib.Path, unit_bytes: int) -> list[Piece]:
  metadata = open_parquet(path).metadata
  pieces, first, size = [], 0, 0
  for group in range(metadata.num_row_groups):
    size += metadata.row_group(group).total_byte_size
    if size >= unit_bytes or group == metadata.num_row_groups - 1:
      pieces.append(Piece("parquet", str(path), first, group + 1, size))
      first, size = group + 1, 0
  return pieces


# --- Reading a piece ---


def _open(path: str) -> io.BufferedIOBase:
  """The bytes of a file, decompressed."""
  if path.lower().endswith(".gz"):
    return gzip.open(path, "rb")
  if path.lower().endswith(".zst"):
    try:
      import pyarrow
    except ModuleNotFoundError:
      raise ModuleNotFoundError(f"reading {path} needs: pip install pyarrow") from None
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))
  return open(path, "rb")


def _read_lines(piece: Piece, reading: Reading) -> Iterator[Document]:
  with _open(piece.path) as file:
    at = piece.first or 0
    if at:
      # The line that the byte before is of belongs to the piece before.
      file.seek(at - 1)
      at += len(file.readline()) - 1
    while piece.last is None or at < piece.last:
      content = file.readline()
      if not content:
        return
      yield from _read_line(content, piece, at, reading)
      at += len(content)


def _read_line(content: bytes, piece: Piece, at: int, reading: Reading) -> Iterator[Document]:
  if at == 0:
    content = content.removeprefix(codecs.BOM_UTF8)
  if not content.strip():
    return
  try:
    record = json.loads(content)
    text = text_of(record, reading.text_field, "")
  except ValueError as error:  # not UTF-8 and not JSON are kinds of it
    reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).lstrip(": ")
    if isinstance(error, json.JSONDecodeError):
      reason = f"not JSON (one object a line is expected): {error}"
    raise ValueError(f"{piece.path}:{_line_number(piece.path, at)}: {reason}") from None
  yield Document(f"{piece.path}@{at}", text)


def _line_number(path: str, at: int) -> int:
  number = 1
  with _open(path) as file:
    while at > 0 and (block := file.read(min(at, 1 << 20))):
      number += block.count(b"\n")
      at -= len(block)
  return number


def _read_text(piece: Piece, reading: Reading) -> Iterator[Document]:
  if not reading.separator:
    yield Document(piece.path, "".join(_decode(piece.path)))
    return
  rest = ""
  for number, text in enumerate(_decode(piece.path)):
    *whole, rest = (rest + text).split(reading.separator)
    for inner, part in enumerate(whole):
      yield Document(f"{piece.path}#{number}.{inner}", part)
  yield Document(piece.path, rest)


def _decode(path: str) -> Iterator[str]:
  decoder = codecs.getincrementaldecoder("utf-8-sig")()
  done = 0
  with _open(path) as file:
    while True:
      block = file.read(_BLOCK)
      try:
        yield decoder.decode(block, final=not block)
      except UnicodeDecodeError as error:
        raise ValueError(
          f"{path} is not UTF-8 text: {error.reason} near byte {done + error.start}"
        ) from None
      done += len(block)
      if not block:
        return


def _read_parquet(piece: Piece, reading: Reading) -> Iterator[Document]:
  file = open_parquet(pathlib.Path(piece.path), reading.text_field)
  groups = range(piece.first, piece.last)
  row = sum(file.metadata.row_group(group).num_rows for group in range(piece.first))
  for batch in file.iter_batches(1024, row_groups=groups, columns=[reading.text_field]):
    for record in batch.to_pylist():
      where = f"{piece.path}#{row}"
      yield Document(where, text_of(record, reading.text_field, where))
      row += 1


def _read_records(piece: Piece, reading: Reading) -> Iterator[Document]:
  reader = ArrayRecordReader(piece.path)
  for first in range(piece.first, piece.last, 256):
    last = min(first + 256, piece.last)
    for number, record in enumerate(_records(reader, piece, first, last), start=first):
      where = f"{piece.path}#{number}"
      try:
        text = record.decode() if reading.records == "text" else None
        value = None if reading.records == "text" else json.loads(record)
      except ValueError as error:
        advice = "; records=text reads records of plain text" if reading.records == "json" else ""
        raise ValueError(f"{where}: not {reading.records}: {error}{advice}") from None
      yield Document(where, text if text is not None else text_of(value, reading.text_field, where))


def _records(reader: ArrayRecordReader, piece: Piece, first: int, last: int) -> Sequence[bytes]:
  try:
    return reader.read(first, last)
  except RuntimeError as error:
    raise ValueError(f"{piece.path}: damaged between records {first} and {last}: {error}") from None


def _read_hub(piece: Piece, reading: Reading) -> Iterator[Document]:
  dataset, field = _hub(piece.path), reading.text_field
  if field not in dataset.column_names:
    text_of(dict.fromkeys(dataset.column_names), field, piece.path)  # raises
  for first in range(piece.first, piece.last, 1024):
    texts = dataset[first : min(first + 1024, piece.last)][field]
    for number, text in enumerate(texts, start=first):
      where = f"{piece.path}#{number}"
      yield Document(where, text_of({field: text}, field, where))


@functools.lru_cache(maxsize=1)
def _hub(source: str):
  return load_hub(source)


def _read_bundled(piece: Piece, reading: Reading) -> Iterable[Document]:
  del reading
  return load_corpus(piece.path)


_READERS = {
  "lines": _read_lines,
  "text": _read_text,
  "parquet": _read_parquet,
  "records": _read_records,
  "hub": _read_hub,
  "bundled": _read_bundled,
}
