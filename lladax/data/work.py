"""The part of `prepare` that runs in worker processes: hash a file, make the shards of a unit.

What a unit becomes depends on its text and the recipe only, so that neither the number of workers
nor a kill in between changes a byte.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lladax.data.corpora import Document, load_corpus, load_hub
from lladax.data.manifest import TOKENIZER, shard_tree, write_json
from lladax.data.packing import Packing
from lladax.data.shards import Shard, ShardWriter, file_sha256, token_type
from lladax.data.tokenizer import Tokenizer, load_tokenizer
from lladax.data.transforms import text_hash
from lladax.data.units import BUNDLED, Reading, Unit, read_unit

UNITS = "units"  # records of finished units, until the manifest is written
# Characters that are tokenized at a time.
_GROUP = 1_000_000

# (bytes of the sources, tokens) done since the last call.
Report = Callable[[int, int], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What every unit of a folder needs to know.

  Attributes:
    folder: that is prepared.
    reading: how text is taken from files.
    packing: how rows are made of documents.
    length: L.
    heldout: fraction of the documents held out.
    split_seed: chooses them.
    tokenizer: sha256 of the one in the folder.
  """

  folder: pathlib.Path
  reading: Reading
  packing: Packing
  length: int
  heldout: float
  split_seed: int
  tokenizer: str


def is_heldout(text: str, heldout: float, split_seed: int) -> bool:
  """Whether a document is held out: by a keyed hash of its text, so equal texts stay together."""
  return int.from_bytes(text_hash(text, split_seed)[:8], "big") < heldout * 2.0**64


def hash_source(path: str, report: Report) -> dict[str, Any]:
  """A source file, or a source without files, as the manifest lists it."""
  del report
  if path in BUNDLED:
    documents = load_corpus(path)
    digest = hashlib.sha256()
    for document in documents:
      digest.update(text_hash(document.text, 0))
    size = sum(document.num_bytes for document in documents)
    return {"path": path, "size": size, "sha256": digest.hexdigest()}
  if path.startswith("hf:"):
    dataset = load_hub(path)
    return {"path": path, "rows": len(dataset), "fingerprint": getattr(dataset, "_fingerprint", "")}
  return {"path": path, "size": os.path.getsize(path), "sha256": file_sha256(path)}


def prepare_unit(job: Job, number: int, unit: Unit, report: Report) -> dict[str, Any]:
  """Writes the shards of a unit and then its record; what is there already and whole is kept.

  Returns:
    The record: shards of each side (JSON of `Shard`), and the number of empty documents.
  """
  path = job.folder / UNITS / f"{number:06}.json"
  record = _finished(path, job.folder)
  size = sum(piece.size for piece in unit)
  if record is not None:
    report(size, 0)
    return record
  tokenizer = _tokenizer(job.folder / TOKENIZER, job.tokenizer)
  dtype = token_type(tokenizer.vocab_size)
  with contextlib.ExitStack() as stack:
    writers = {}
    for side in ("train", "heldout"):
      name = f"{side}-{number:06}.array_record"
      writers[side] = ShardWriter(job.folder / name, length=job.length, dtype=dtype)
      stack.callback(writers[side].discard)
    stream = _Stream(job, tokenizer, _reported(unit, job.reading, report, size), report)
    for row in job.packing.rows(stream.train(), job.length):
      writers["train"].write(*row)
    for row in job.packing.rows(stream.heldout, job.length):
      writers["heldout"].write(*row)
    shards = {side: writer.close(**stream.counts[side]) for side, writer in writers.items()}
  record = {side: shard_tree([shard]) for side, shard in shards.items()} | {"empty": stream.empty}
  write_json(path, record)
  return record


class _Stream:
  """The documents of a unit as tokens: those to train on one after another, those held out kept."""

  def __init__(self, job: Job, tokenizer: Tokenizer, documents: Iterator[Document], report: Report):
    self._job, self._tokenizer, self._documents, self._report = job, tokenizer, documents, report
    self.heldout: list[np.ndarray] = []
    self.counts = {side: {"documents": 0, "text_bytes": 0} for side in ("train", "heldout")}
    self.empty = 0

  def train(self) -> Iterator[np.ndarray]:
    group, size = [], 0
    for document in self._documents:
      if not document.text:
        self.empty += 1
        continue
      group.append(document)
      size += len(document.text)
      if size >= _GROUP:
        yield from self._tokenize(group)
        group, size = [], 0
    yield from self._tokenize(group)

  def _tokenize(self, group: Sequence[Document]) -> Iterator[np.ndarray]:
    job, end = self._job, [self._tokenizer.eos_id]
    encoded = self._encode(group)
    self._report(0, sum(len(ids) + 1 for ids in encoded))
    for document, ids in zip(group, encoded, strict=True):
      held = is_heldout(document.text, job.heldout, job.split_seed)
      counts = self.counts["heldout" if held else "train"]
      counts["documents"] += 1
      counts["text_bytes"] += document.num_bytes
      tokens = np.concatenate([ids, end], dtype=np.int32)
      if held:
        self.heldout.append(tokens)
      else:
        yield tokens

  def _encode(self, group: Sequence[Document]) -> list[np.ndarray]:
    try:
      return self._tokenizer.encode_batch([document.text for document in group])
    except ValueError:
      for document in group:  # which one it was
        try:
          self._tokenizer.encode(document.text)
        except ValueError as error:
          raise ValueError(f"{document.name}: {error}") from None
      raise


def _reported(unit: Unit, reading: Reading, report: Report, size: int) -> Iterator[Document]:
  """The documents of a unit; reports their bytes, `size` in the end."""
  told = waiting = 0
  for document in read_unit(unit, reading):
    yield document
    # Text in a compressed file is longer than the file.
    waiting = min(waiting + len(document.text), size - told)
    if waiting >= _GROUP:
      report(waiting, 0)
      told, waiting = told + waiting, 0
  report(size - told, 0)


def _finished(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any] | None:
  """The record of a unit whose shards are all there and whole."""
  try:
    record = json.loads(path.read_text())
    shards = [Shard(**shard) for side in ("train", "heldout") for shard in record[side]]
    whole = all(file_sha256(folder / shard.name) == shard.sha256 for shard in shards)
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return record if whole else None


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: pathlib.Path, sha256: str) -> Tokenizer:
  del sha256  # which one it is, for the cache
  return load_tokenizer(folder)


# --- Processes ---


class Interrupted(RuntimeError):
  """The work was stopped from outside."""


# In a worker: bytes done, tokens done, whether to stop.
_shared = None


class Workers:
  """Runs tasks in processes, or here where there is one; counts what they report.

  Attributes:
    count: of them.
  """

  def __init__(self, count: int):
    self.count = count
    self._here = [0, 0]
    self._shared = None
    self._pool = None

  def __enter__(self) -> Workers:
    if self.count > 1:
      # Not forked: JAX and the tokenizers have threads.
      context = multiprocessing.get_context("spawn")
      self._shared = context.Array("q", 3)
      self._pool = concurrent.futures.ProcessPoolExecutor(
        self.count, context, initializer=_start, initargs=(self._shared,)
      )
    return self

  def __exit__(self, *exception):
    if self._pool is not None:
      if any(exception):
        self._shared[2] = 1
      self._pool.shutdown(cancel_futures=True)

  @property
  def done(self) -> tuple[int, int]:
    """Bytes and tokens."""
    return tuple(self._here if self._shared is None else self._shared[:2])

  def run(self, task: Callable, arguments: Sequence[tuple], tick: Callable[[], object]) -> list:
    """`task(*arguments, report=...)` of each, results in order; calls `tick` now and then.

    Raises:
      RuntimeError: if a worker was killed; what the tasks raise.
    """
    if self._pool is None:
      return self._run_here(task, arguments, tick)
    futures = [self._pool.submit(_run_task, task, one) for one in arguments]
    waiting = set(futures)
    try:
      while waiting:
        finished, waiting = concurrent.futures.wait(
          waiting, timeout=0.2, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        for future in finished:
          future.result()
        tick()
      return [future.result() for future in futures]
    except concurrent.futures.process.BrokenProcessPool:
      raise RuntimeError(
        "a worker process was killed (out of memory?); the same command, perhaps with fewer "
        "--workers, goes on from the units that are finished"
      ) from None

  def _run_here(self, task, arguments, tick) -> list:
    def report(num_bytes: int, num_tokens: int):
      self._here[0] += num_bytes
      self._here[1] += num_tokens
      tick()

    with _one_thread():
      return [task(*one, report=report) for one in arguments]


def _start(shared):
  global _shared
  _shared = shared
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _run_task(task: Callable, arguments: tuple):
  def report(num_bytes: int, num_tokens: int):
    with _shared.get_lock():
      _shared[0] += num_bytes
      _shared[1] += num_tokens
    if _shared[2]:
      raise Interrupted("stopped")

  return task(*arguments, report=report)


@contextlib.contextmanager
def _one_thread():
  """Tokenizes on one core, as each of several workers does."""
  name = "TOKENIZERS_PARALLELISM"
  before = os.environ.get(name)
  os.environ[name] = "false"
  try:
    yield
  finally:
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before
