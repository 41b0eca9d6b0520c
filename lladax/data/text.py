"""Text that is tokenized when a run begins and kept in memory: corpora of some hundred megabytes.

Larger ones are prepared once (`python -m lladax.data prepare`) and read by `PreparedConfig`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from lladax.data.corpora import Document, load_corpus
from lladax.data.mixture import Draws, Mixture, Part, order_seed
from lladax.data.pipeline import BatchesConfig, Data
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
class DataConfig(BatchesConfig):
  """What text, how it becomes tokens, and how it is drawn.

  Attributes:
    corpus: `shakespeare`, `python`, `hf:<id>`, a file, pattern or folder, or several of them; see
      `lladax.data.corpora.load_corpus`.
    text_field: the field of JSON objects and Parquet tables that holds the text.
    separator: cuts text files into documents.
    tokenizer: `bytes`, `bpe:<vocabulary>` (trained on the training documents) or the path of a
      `tokenizer.json`.
    mask_token, eos_token, pad_token: their names in a `tokenizer.json`, where they are unusual.
    heldout: fraction of the bytes held out, in whole documents.
    split_seed: chooses the held-out documents. Apart from `seed`, so that runs with different
      seeds are scored on the same text.
    random_length: fraction of rows cropped to a length of U{shortest..length}.
    shortest: see `random_length` (LLaDA-MoE: 8).

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
  heldout: float = 0.05
  split_seed: int = 0
  random_length: float = 0.01
  shortest: int = 8

  def __post_init__(self):
    super().__post_init__()
    check_crops(self.random_length, self.shortest)
    if self.split_seed < 0:
      raise ValueError(f"split_seed is not negative, got {self.split_seed}")
    if not 0 <= self.heldout < 1:
      raise ValueError(f"heldout is a fraction of at least 0 and below 1, got {self.heldout}")

  def load(self, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> TextData:
    """Reads, splits, tokenizes and packs the corpus.

    Raises:
      ValueError: for a corpus that is empty or cannot be split, or a vocabulary below the ids.
      FileNotFoundError, ModuleNotFoundError: see `load_corpus` and `make_tokenizer`.
    """
    documents = load_corpus(self.corpus, text_field=self.text_field, separator=self.separator)
    train, heldout = split_documents(documents, self.heldout, self.split_seed)
    if tokenizer is None:
      tokenizer = make_tokenizer(
        self.tokenizer,
        [document.text for document in train],
        mask_token=self.mask_token,
        eos_token=self.eos_token,
        pad_token=self.pad_token,
      )
    if vocab_size is not None:
      check_ids(np.array([tokenizer.vocab_size - 1]), vocab_size)
    tokens = tokenize([document.text for document in (*train, *heldout)], tokenizer)
    sides = [
      pack(side, self.length, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
      for side in (tokens[: len(train)], tokens[len(train) :])
    ]
    data = TextData(
      config=self,
      tokenizer=tokenizer,
      train_documents=train,
      heldout_documents=heldout,
      train_rows=sides[0],
      heldout_rows=sides[1],
    )
    logging.info(
      "corpus %r: %d documents (%d tokens) to train on, %d (%d tokens, %d bytes) held out",
      self.corpus, len(train), sides[0].num_tokens, len(heldout), sides[1].num_tokens,
      data.heldout_bytes,
    )  # fmt: skip
    return data


def check_crops(random_length: float, shortest: int):
  """Raises ValueError for values outside their range."""
  if shortest < 1:
    raise ValueError(f"shortest is at least 1, got {shortest}")
  if not 0 <= random_length <= 1:
    raise ValueError(f"random_length is a probability, got {random_length}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextData(Data):
  """The two sides of a corpus, as documents and as packed rows."""

  config: DataConfig
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

  @functools.cached_property
  def mixture(self) -> Mixture:
    corpus = self.config.corpus
    names = (corpus,) if isinstance(corpus, str) else corpus
    tokens = np.ascontiguousarray(self.train_rows.tokens, "<i4")
    part = Part(
      name="+".join(pathlib.PurePath(name).name for name in names),
      key=hashlib.sha256(tokens).hexdigest()[:16],
      size=len(self.train_rows),
      order_seed=order_seed(self.config.seed),
    )
    return Mixture([part])

  def train_batch(self, draws: Draws, rows: np.ndarray) -> Batch:
    draws = draws[rows]
    lengths = crop_lengths(self.config.seed, draws.number, self.config)
    index = self.mixture.rows(draws)
    return make_batch(self.train_rows, index, pad_id=self.tokenizer.pad_id, lengths=lengths)

  @property
  def num_heldout(self) -> int:
    return len(self.heldout_rows)

  def heldout_batch(self, index: np.ndarray) -> Batch:
    return make_batch(self.heldout_rows, index, pad_id=self.tokenizer.pad_id)

  def fingerprint(self) -> dict[str, Any]:
    return {
      "train_tokens": self.train_rows.num_tokens,
      "heldout_tokens": self.heldout_rows.num_tokens,
      "crc32": zlib.crc32(np.ascontiguousarray(self.train_rows.tokens)),
    }


def crop_lengths(seed: int, numbers: np.ndarray, config) -> np.ndarray:
  """int64[R], how many tokens of each drawn row stay.

  Args:
    config: has `length`, `random_length` and `shortest`.
  """
  lengths = [
    crop_length(
      seed,
      int(number),
      length=config.length,
      probability=config.random_length,
      shortest=config.shortest,
    )
    for number in numbers
  ]
  return np.array(lengths, np.int64)


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
