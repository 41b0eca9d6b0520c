"""The data of an experiment: text in, `Batch`es of clean tokens out, by grain.

The global batch at step s is a function of (rows, seed, s). Each process computes its own part of
it, so neither the number of processes nor a restart changes what the network sees.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence

import grain
import jax
import numpy as np
from absl import logging

from lladax.data.corpora import Document, load_corpus
from lladax.data.tokenizer import Tokenizer, make_tokenizer
from lladax.data.transforms import (
  Rows,
  check_ids,
  crop_length,
  make_batch,
  pack,
  split_documents,
)
from lladax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What text, how it becomes tokens, and how it is drawn.

  Attributes:
    corpus: `shakespeare`, `python`, `hf:<id>`, a file, pattern or folder, or several of them; see
      `lladax.data.corpora.load_corpus`.
    text_field: the field of JSON objects and Parquet tables that holds the text.
    separator: cuts text files into documents.
    tokenizer: `bytes`, `bpe:<vocabulary>` (trained on the training documents) or the path of a
      `tokenizer.json`.
    mask_token, eos_token, pad_token: their names in a `tokenizer.json`, where they are unusual.
    length: tokens in a row, L.
    batch_size: rows in the global batch, B.
    heldout: fraction of the bytes held out, in whole documents.
    split_seed: chooses the held-out documents. Apart from `seed`, so that runs with different
      seeds are scored on the same text.
    seed: order of the rows and crops.
    random_length: fraction of rows cropped to a length of U{shortest..length}.
    shortest: see `random_length` (LLaDA-MoE: 8).
    prefetch: batches prepared ahead in a thread; 0 for none.

  Raises:
    ValueError: for a value outside its range.
  """

  corpus: str | tuple[str, ...] = "shakespeare"
  text_field: str = "text"
  separator: str | None = None
  tokenizer: str = "bytes"
  mask_token: str | None = None
  eos_token: str | None = None
  pad_token: str | None = None
  length: int = 256
  batch_size: int = 16
  heldout: float = 0.05
  split_seed: int = 0
  seed: int = 0
  random_length: float = 0.01
  shortest: int = 8
  prefetch: int = 2

  def __post_init__(self):
    for name in ("length", "batch_size", "shortest"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
    for name in ("seed", "split_seed", "prefetch"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} is not negative, got {getattr(self, name)}")
    if not 0 <= self.heldout < 1:
      raise ValueError(f"heldout is a fraction of at least 0 and below 1, got {self.heldout}")
    if not 0 <= self.random_length <= 1:
      raise ValueError(f"random_length is a probability, got {self.random_length}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
  """The two sides of a corpus, as documents and as packed rows, and the tokenizer between them."""

  config: DataConfig
  tokenizer: Tokenizer
  train_documents: list[Document]
  heldout_documents: list[Document]
  train_rows: Rows
  heldout_rows: Rows

  @functools.cached_property
  def train_text(self) -> str:
    return "".join(document.text for document in self.train_documents)

  @functools.cached_property
  def heldout_text(self) -> str:
    """All of it: its UTF-8 length is what the tokens of `heldout_rows` stand for."""
    return "".join(document.text for document in self.heldout_documents)

  @functools.cached_property
  def heldout_bytes(self) -> int:
    return sum(document.num_bytes for document in self.heldout_documents)

  def train_iterator(
    self,
    *,
    start_step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
  ) -> grain.DatasetIterator:
    """Endless iterator of `Batch` [B / process_count, L], from the batch of step `start_step` on.

    `get_state()` is `{"next_index": step}` on every process and whatever their number: it may be
    saved once (or by `grain.checkpoint.CheckpointSave`), and `set_state` continues exactly.
    """
    dataset = train_dataset(
      self.train_rows,
      self.config,
      pad_id=self.tokenizer.pad_id,
      process_index=process_index,
      process_count=process_count,
    )
    iterator = iter(dataset)
    if start_step:
      iterator.set_state({**iterator.get_state(), "next_index": start_step})
    return iterator

  def heldout_iterator(
    self,
    *,
    batch_size: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
  ) -> grain.DatasetIterator:
    """One pass over the held-out rows in order, every token once; see `heldout_dataset`."""
    dataset = heldout_dataset(
      self.heldout_rows,
      batch_size or self.config.batch_size,
      pad_id=self.tokenizer.pad_id,
      process_index=process_index,
      process_count=process_count,
    )
    return iter(dataset)

  def epoch(self, step: int) -> float:
    """Passes over the training rows that were completed before step `step`."""
    return step * self.config.batch_size / len(self.train_rows)

  def text_bytes(self, batch: Batch | Rows) -> int:
    """UTF-8 bytes that the tokens of a batch or of rows stand for.

    Raises:
      ValueError: if the tokenizer's ids do not tell (it is not byte-level).
    """
    lengths = self.tokenizer.byte_lengths
    if lengths is None:
      raise ValueError(
        "bytes cannot be counted from the ids of a tokenizer that is not byte-level; "
        "score all held-out rows and divide by heldout_bytes"
      )
    is_text = np.asarray(batch.segment_ids) > 0
    return int(lengths[np.asarray(batch.tokens)[is_text]].sum())


def load_data(
  config: DataConfig, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> Data:
  """Reads, splits, tokenizes and packs a corpus.

  Args:
    config: what to read.
    tokenizer: used instead of `config.tokenizer`, e.g. that of a checkpoint.
    vocab_size: of the model, where it is known: checked before anything is tokenized.

  Raises:
    ValueError: for a corpus that is empty or cannot be split, or a vocabulary below the ids.
    FileNotFoundError, ModuleNotFoundError: see `load_corpus` and `make_tokenizer`.
  """
  documents = load_corpus(config.corpus, text_field=config.text_field, separator=config.separator)
  train, heldout = split_documents(documents, config.heldout, config.split_seed)
  if tokenizer is None:
    tokenizer = make_tokenizer(
      config.tokenizer,
      [document.text for document in train],
      mask_token=config.mask_token,
      eos_token=config.eos_token,
      pad_token=config.pad_token,
    )
  if vocab_size is not None:
    check_ids(np.array([tokenizer.vocab_size - 1]), vocab_size)
  tokens = tokenize([document.text for document in (*train, *heldout)], tokenizer)
  sides = [
    pack(side, config.length, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    for side in (tokens[: len(train)], tokens[len(train) :])
  ]
  data = Data(
    config=config,
    tokenizer=tokenizer,
    train_documents=train,
    heldout_documents=heldout,
    train_rows=sides[0],
    heldout_rows=sides[1],
  )
  logging.info(
    "corpus %r: %d documents (%d tokens) to train on, %d (%d tokens, %d bytes) held out",
    config.corpus, len(train), sides[0].num_tokens, len(heldout), sides[1].num_tokens,
    data.heldout_bytes,
  )  # fmt: skip
  return data


def train_dataset(
  rows: Rows,
  config: DataConfig,
  *,
  pad_id: int,
  process_index: int | None = None,
  process_count: int | None = None,
) -> grain.IterDataset:
  """Batches without end: every row once in an epoch, each epoch in another order.

  Process p of P gives rows [p B / P, (p + 1) B / P) of the global batch, so their concatenation is
  the batch of a single process. A batch may hold the end of one epoch and the start of the next.

  Raises:
    ValueError: if there are no rows, or the batch does not divide over the processes.
  """
  if not len(rows):
    raise ValueError("there is no text to train on")
  first, count = _own_rows(config.batch_size, process_index, process_count)
  # Not the seed itself: grain adds the epoch to it, and seed 1 would start with epoch 1 of seed 0.
  shuffle_seed = int(np.random.SeedSequence([config.seed, 0x5F1E]).generate_state(1)[0])
  order = grain.MapDataset.range(len(rows)).shuffle(seed=shuffle_seed).repeat()

  def batch_of(step: int) -> Batch:
    draws = range(step * config.batch_size + first, step * config.batch_size + first + count)
    lengths = [
      crop_length(
        config.seed,
        draw,
        length=rows.length,
        probability=config.random_length,
        shortest=config.shortest,
      )
      for draw in draws
    ]
    index = np.array([order[draw] for draw in draws])
    return make_batch(rows, index, pad_id=pad_id, lengths=np.array(lengths))

  steps = grain.MapDataset.range(sys.maxsize // (config.batch_size + 1))
  return _to_iter_dataset(steps.map(batch_of), config.prefetch)


def heldout_dataset(
  rows: Rows,
  batch_size: int,
  *,
  pad_id: int,
  process_index: int | None = None,
  process_count: int | None = None,
) -> grain.IterDataset:
  """Batches of all rows once, in order; empty rows (segment 0) fill up the last batch.

  Raises:
    ValueError: if there are no rows, or the batch does not divide over the processes.
  """
  if not len(rows):
    raise ValueError("there is no held-out text (data.heldout is 0)")
  first, count = _own_rows(batch_size, process_index, process_count)

  def batch_of(step: int) -> Batch:
    index = step * batch_size + first + np.arange(count)
    return make_batch(rows, np.where(index < len(rows), index, -1), pad_id=pad_id)

  num_batches = -(-len(rows) // batch_size)
  return _to_iter_dataset(grain.MapDataset.range(num_batches).map(batch_of), prefetch=0)


def _own_rows(
  batch_size: int, process_index: int | None, process_count: int | None
) -> tuple[int, int]:
  """First row and number of rows of this process in a global batch."""
  process_index = jax.process_index() if process_index is None else process_index
  process_count = jax.process_count() if process_count is None else process_count
  if not 0 <= process_index < process_count:
    raise ValueError(f"process {process_index} is not one of {process_count}")
  if batch_size % process_count:
    raise ValueError(f"a batch of {batch_size} rows does not divide over {process_count} processes")
  count = batch_size // process_count
  return process_index * count, count


def _to_iter_dataset(dataset: grain.MapDataset, prefetch: int) -> grain.IterDataset:
  options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
  return dataset.to_iter_dataset(options)


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
  """Ids of each text, int32; a progress bar on a terminal once it takes longer than a second."""
  total = sum(map(len, texts))
  started, done, bar, tokens = time.monotonic(), 0, None, []
  try:
    for group in _groups(texts, 1_000_000):
      tokens += tokenizer.encode_batch(group)
      done += sum(map(len, group))
      if bar is None and sys.stderr.isatty() and time.monotonic() - started > 1:
        bar = _progress_bar(total)
      if bar is not None:
        bar.update(bar.task_ids[0], completed=done)
  finally:
    if bar is not None:
      bar.stop()
  return tokens


def _groups(texts: Sequence[str], characters: int):
  """Consecutive texts in groups of at least so many characters, the last one smaller."""
  group, size = [], 0
  for text in texts:
    group.append(text)
    size += len(text)
    if size >= characters:
      yield group
      group, size = [], 0
  if group:
    yield group


def _progress_bar(total: int):
  from rich.console import Console
  from rich.progress import Progress

  bar = Progress(console=Console(stderr=True), transient=True)
  bar.add_task("tokenizing", total=total)
  bar.start()
  return bar
