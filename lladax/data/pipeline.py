"""The data of an experiment as `Batch`es of clean tokens: what every kind of data has in common.

The global batch at step s is a function of (data, config, seed, s). Each process computes the rows
that its devices hold, so neither the number of processes nor a restart changes what the network
sees.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from lladax.config import ConfigError
from lladax.data.mixture import Draws, Mixture
from lladax.data.tokenizer import Tokenizer
from lladax.data.transforms import Rows
from lladax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchesConfig(abc.ABC):
  """What every kind of data says of its batches; a subclass adds where the text is from.

  Attributes:
    length: tokens in a row, L.
    batch_size: rows in the global batch, B.
    seed: order of the rows and crops.
    prefetch: batches prepared ahead in threads; 0 for none.

  Raises:
    ValueError: for a value outside its range.
  """

  length: int = 256
  batch_size: int = 16
  seed: int = 0
  prefetch: int = 2

  def __post_init__(self):
    for name in ("length", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
    for name in ("seed", "prefetch"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} is not negative, got {getattr(self, name)}")

  @abc.abstractmethod
  def load(self, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> Data:
    """Opens the data and checks it, before any device is used.

    Args:
      tokenizer: used instead of the config's, e.g. that of a checkpoint.
      vocab_size: of the model, where it is known; the ids of the text have to be below it.
    """


def __getattr__(name: str):
  if name == "DataConfig":  # runs from before it moved name it here, in their saved config
    from lladax.data.text import DataConfig

    return DataConfig
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_data(
  config: BatchesConfig, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> Data:
  """`config.load`, by the kind of the config."""
  return config.load(tokenizer=tokenizer, vocab_size=vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data(abc.ABC):
  """Text to train on and held-out text, as batches; the tokenizer between text and ids.

  A subclass says what its sources are (`mixture`) and how rows become a batch.

  Attributes:
    config: what was loaded.
    tokenizer: of its ids.
  """

  config: BatchesConfig
  tokenizer: Tokenizer

  @property
  @abc.abstractmethod
  def mixture(self) -> Mixture:
    """The sources of the training rows and how they are drawn."""

  @abc.abstractmethod
  def train_batch(self, draws: Draws, rows: np.ndarray) -> Batch:
    """Rows of one global batch.

    Args:
      draws: of the whole global batch, so that a row may depend on the others.
      rows: int[R], which of them are asked for.
    """

  @property
  @abc.abstractmethod
  def num_heldout(self) -> int:
    """Rows of held-out text."""

  @abc.abstractmethod
  def heldout_batch(self, index: np.ndarray) -> Batch:
    """Held-out rows by number, int[R]; -1 is an empty row, all padding (segment 0)."""

  @abc.abstractmethod
  def fingerprint(self) -> dict[str, Any]:
    """JSON that tells this text and its tokenizer from any other, and a path from nothing."""

  @property
  def has_heldout(self) -> bool:
    return self.num_heldout > 0

  def train_iterator(self, *, rows: np.ndarray | None = None) -> TrainIterator:
    """Endless iterator of `Batch` [R, L], from step 0 on.

    Args:
      rows: which rows of the global batch this process feeds, increasing. None: all.

    Raises:
      ValueError: for rows that are not of the batch.
    """
    return TrainIterator(self, rows=rows)

  def heldout_iterator(
    self, *, batch_size: int | None = None, rows: np.ndarray | None = None
  ) -> Iterator[Batch]:
    """One pass over the held-out rows in order, every token once.

    Empty rows (segment 0) fill up the last batch.

    Args:
      batch_size: rows of the global batch. None: as in training.
      rows: which of them this process feeds, increasing. None: all.

    Raises:
      ValueError: if there is no held-out text, or for rows that are not of the batch.
    """
    if not self.has_heldout:
      raise ValueError("there is no held-out text: the data was made with heldout 0")
    batch_size = batch_size or self.config.batch_size
    rows = _check_rows(rows, batch_size)

    def batch_of(step: int) -> Batch:
      index = step * batch_size + rows
      return self.heldout_batch(np.where(index < self.num_heldout, index, -1))

    num_batches = -(-self.num_heldout // batch_size)
    return iter(_to_iter_dataset(batch_of, num_batches, prefetch=0))

  def epochs(self, step: int, start: dict[str, int] | None = None) -> dict[str, float]:
    """Passes over each source that were completed before step `step` of a stage, by its name.

    Args:
      start: rows drawn before the stage, by key of the source (`TrainIterator.start`).
    """
    counts = self.mixture.counts(step * self.config.batch_size)
    start = start or {}
    return {
      part.name: (start.get(part.key, 0) + counts[part.key]) / part.size
      for part in self.mixture.parts
    }

  def text_bytes(self, batch: Batch | Rows) -> int:
    """UTF-8 bytes that the tokens of a batch or of rows stand for.

    Raises:
      ValueError: if the tokenizer's ids do not tell (it is not byte-level).
    """
    lengths = self.tokenizer.byte_lengths
    if lengths is None:
      raise ValueError(
        "bytes cannot be counted from the ids of a tokenizer that is not byte-level; "
        "score all held-out rows and divide by the bytes of their text"
      )
    is_text = np.asarray(batch.segment_ids) > 0
    return int(lengths[np.asarray(batch.tokens)[is_text]].sum())


class TrainIterator:
  """The training batches of a stage, from any step on; made by `Data.train_iterator`.

  Its state is the same on every process, whatever rows they feed: it may be saved once and restored
  on another number of processes.

  Attributes:
    start: rows of each source drawn before this stage, by key of the source.
  """

  def __init__(self, data: Data, *, rows: np.ndarray | None = None):
    self._data = data
    self._rows = _check_rows(rows, data.config.batch_size)
    self._begin({}, 0)

  def __iter__(self) -> TrainIterator:
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._next_index += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """JSON: `next_index`, the step; `start` and `drawn`, rows by source up to the stage and now."""
    return {
      "next_index": self._next_index,
      "start": dict(self.start),
      "drawn": self._drawn(self._next_index),
    }

  def set_state(self, state: dict[str, Any]):
    """Goes on exactly where the state was taken, on any process and with any rows.

    Raises:
      ConfigError: if the state is of other sources, weights or another batch size.
    """
    before = self.start, self._next_index
    # Runs from before mixtures saved the step alone.
    self._begin(dict(state.get("start", {})), int(state["next_index"]))
    now = self._drawn(self._next_index)
    if state.get("drawn", now) != now:
      self._begin(*before)
      raise ConfigError(
        f"the state of the data is of other sources, weights or another batch size: it has drawn "
        f"{state['drawn']} rows, and this config draws {now}; start a new stage from it instead"
      )

  def continue_after(self, state: dict[str, Any]):
    """Starts a new stage after the one of the state, at step 0, with its own weights.

    Sources that both have go on with the row after the last that was drawn; others start at their
    first. What was drawn of sources that this stage does not have is kept for a later one.
    """
    self._begin(dict(state.get("drawn", {})), 0)

  def epochs(self, step: int | None = None) -> dict[str, float]:
    """Passes completed by name of the source, before a step of this stage (None: the next)."""
    return self._data.epochs(self._next_index if step is None else step, self.start)

  def _begin(self, start: dict[str, int], next_index: int):
    self.start, self._next_index = start, next_index
    data, rows, batch_size = self._data, self._rows, self._data.config.batch_size
    mixture = data.mixture

    def batch_of(step: int) -> Batch:
      return data.train_batch(mixture.draws(step * batch_size, batch_size, start), rows)

    steps = sys.maxsize // (batch_size + 1)
    self._batches = iter(_to_iter_dataset(batch_of, steps, data.config.prefetch))
    if next_index:
      self._batches.set_state({**self._batches.get_state(), "next_index": next_index})

  def _drawn(self, step: int) -> dict[str, int]:
    counts = self._data.mixture.counts(step * self._data.config.batch_size)
    return {**self.start, **{key: self.start.get(key, 0) + n for key, n in counts.items()}}


def _check_rows(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
  if rows is None:
    return np.arange(batch_size)
  rows = np.asarray(rows, np.int64)
  if rows.ndim != 1 or not rows.size or rows[0] < 0 or rows[-1] >= batch_size:
    raise ValueError(f"a process feeds rows of a batch of {batch_size}, got rows {rows.tolist()}")
  if (np.diff(rows) < 1).any():
    raise ValueError(f"the rows that a process feeds increase, got {rows.tolist()}")
  return rows


def _to_iter_dataset(
  batch_of: Callable[[int], Batch], steps: int, prefetch: int
) -> grain.IterDataset:
  # Threads work at different batches; they are given out in order.
  options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
  return grain.MapDataset.range(steps).map(batch_of).to_iter_dataset(options)
