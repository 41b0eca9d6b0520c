"""From documents to rows of fixed length: split, pack, crop. Pure functions on numpy arrays.

Documents are laid end to end, each closed by end of text, and the stream is cut every L tokens
(as in LLaDA, arXiv 2502.09992, and LLaDA-MoE, arXiv 2509.24389). Unlike there, the pieces of
different documents in a row are kept apart by segment ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from absl import logging

from lladax.data.corpora import Document
from lladax.types import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """Packed text, R rows of L tokens.

  Attributes:
    tokens: int32[R, L].
    segment_ids: int32[R, L]. 1, 2, ... along a row, a new one where a document begins; 0 is padding.
    positions: int32[R, L]. From 0 in each segment.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def length(self) -> int:
    return self.tokens.shape[1]

  @property
  def num_tokens(self) -> int:
    """Tokens of text, ends of documents included, padding not."""
    return int(np.count_nonzero(self.segment_ids))


def split_documents(
  documents: Sequence[Document], heldout: float, seed: int
) -> tuple[list[Document], list[Document]]:
  """Training and held-out documents, in the order given; about `heldout` of the bytes held out.

  The choice depends on the texts and the seed only, not on names or order: documents are visited
  in the order of a keyed hash of their text, and held out while that brings the held-out bytes
  nearer to the goal. Equal texts stay on one side.

  Raises:
    ValueError: if `heldout` is not in [0, 1), or the split would leave a side without text.
  """
  if not 0 <= heldout < 1:
    raise ValueError(f"heldout is a fraction of the bytes, at least 0 and below 1; got {heldout}")
  if heldout == 0:
    return list(documents), []
  keys = [text_hash(document.text, seed) for document in documents]
  texts = dict.fromkeys(keys, 0)  # bytes of each distinct text, with its repetitions
  for key, document in zip(keys, documents, strict=True):
    texts[key] += document.num_bytes
  if len(texts) < 2:
    raise ValueError(
      f"a held-out part of {heldout} is made of whole documents, and there is only {len(texts)}; "
      "give the text as several documents (data.separator cuts a file), or set data.heldout=0"
    )
  goal = heldout * sum(texts.values())
  chosen, held = set(), 0
  for key in sorted(texts):
    if abs(held + texts[key] - goal) < abs(held - goal):
      chosen.add(key)
      held += texts[key]
  if not chosen:  # every document is above twice the goal
    chosen.add(min(texts, key=lambda key: (texts[key], key)))
    logging.warning("the smallest document is held out: every one has over %g of the text", heldout)
  train = [document for key, document in zip(keys, documents, strict=True) if key not in chosen]
  held_out = [document for key, document in zip(keys, documents, strict=True) if key in chosen]
  if not train:
    raise ValueError(f"heldout={heldout} leaves no text to train on; {len(documents)} documents")
  return train, held_out


def text_hash(text: str, seed: int) -> bytes:
  """16 bytes that depend on the text and the seed."""
  key = str(seed).encode()[:64]
  return hashlib.blake2b(text.encode(), digest_size=16, key=key).digest()


def pack(documents: Sequence[Sequence[int]], length: int, *, eos_id: int, pad_id: int) -> Rows:
  """Rows of `length` tokens that hold every token of every document, each closed by `eos_id`.

  A document that crosses the end of a row goes on in the next as a segment of its own, with
  positions from 0 again; how many did is logged. Only the last row can have padding.

  Args:
    documents: token ids of each document.
    length: L.

  Raises:
    ValueError: if `length` is below 1.
  """
  if length < 1:
    raise ValueError(f"rows have a length of at least 1 token, got {length}")
  sizes = np.array([len(document) + 1 for document in documents], np.int64)
  total = int(sizes.sum())
  num_rows = math.ceil(total / length)
  tokens = np.full(num_rows * length, pad_id, np.int32)
  segment_ids = np.zeros((num_rows, length), np.int32)
  positions = np.zeros((num_rows, length), np.int32)
  ends = np.cumsum(sizes)
  for document, size, end in zip(documents, sizes, ends, strict=True):
    tokens[end - size : end - 1] = document
  tokens[ends - 1] = eos_id

  # A segment starts where a document or a row does.
  starts = np.zeros(num_rows * length, bool)
  starts[::length] = True
  starts[(ends - sizes)] = True
  index = np.arange(num_rows * length)
  start_of = np.maximum.accumulate(np.where(starts, index, 0))
  is_text = (index < total).reshape(num_rows, length)
  segment_ids[is_text] = np.cumsum(starts.reshape(num_rows, length), axis=1)[is_text]
  positions[is_text] = (index - start_of).reshape(num_rows, length)[is_text]

  pieces = (ends - 1) // length - (ends - sizes) // length + 1
  logging.info(
    "packed %d documents (%d tokens) into %d rows of %d: %d documents were cut, into %d pieces",
    len(documents), total, num_rows, length, np.sum(pieces > 1), np.sum(pieces[pieces > 1]),
  )  # fmt: skip
  return Rows(tokens.reshape(num_rows, length), segment_ids, positions)


def unpack(rows: Rows, *, eos_id: int) -> list[np.ndarray]:
  """The documents that `pack` was given, without their end of text."""
  stream = rows.tokens[rows.segment_ids > 0]
  ends = np.flatnonzero(stream == eos_id)
  return [part[:-1] for part in np.split(stream, ends + 1)[:-1]]


def crop_length(seed: int, draw: int, *, length: int, probability: float, shortest: int) -> int:
  """How many tokens of a row stay when it is drawn as number `draw` of the run.

  With the given probability U{shortest..length}, else `length`. LLaDA-MoE (arXiv 2509.24389) crops
  1 % of its training steps to U{8..4096}, so that the network also knows short contexts; here each
  row is drawn for itself. A function of (seed, draw) only.
  """
  if probability == 0:
    return length
  random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, draw, 0xC509])))
  if random.random() >= probability:
    return length
  return int(random.integers(min(shortest, length), length, endpoint=True))


def make_batch(
  rows: Rows, index: np.ndarray, *, pad_id: int, lengths: np.ndarray | None = None
) -> Batch:
  """Rows by number as a `Batch` of numpy arrays [B, L], all text maskable.

  Args:
    index: int[B], numbers of rows; -1 for an empty row, all padding.
    pad_id: token of padding.
    lengths: int[B], how many tokens of each row stay; the rest becomes padding. None for all.
  """
  index = np.asarray(index, np.int64)
  lengths = np.full(len(index), rows.length) if lengths is None else np.asarray(lengths)
  lengths = np.where(index < 0, 0, lengths)
  stays = np.arange(rows.length) < lengths[:, None]  # [B, L]
  segment_ids = np.where(stays, rows.segment_ids[index], 0)
  return Batch(
    tokens=np.where(stays, rows.tokens[index], np.int32(pad_id)),
    segment_ids=segment_ids,
    positions=np.where(stays, rows.positions[index], 0),
    maskable=segment_ids > 0,
  )


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
  """Makes sure that every id has a row in the embedding.

  Raises:
    ValueError: if an id is negative or not below `vocab_size`.
  """
  if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
    worst = tokens.min() if tokens.min() < 0 else tokens.max()
    raise ValueError(
      f"the text has token id {worst}, and the vocabulary has {vocab_size} ids; "
      "give the model at least the vocab_size of the tokenizer"
    )
