"""Laws of packing: every token of every document once, and nothing cut that need not be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.data.packing import BestFit, Stream
from lladax.data.transforms import pack

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def numbered(sizes):
  """Documents whose tokens are all different."""
  ends = np.cumsum(sizes)
  return [np.arange(end - size, end, dtype=np.int32) for size, end in zip(sizes, ends, strict=True)]


def segments(rows):
  """Token lists of every segment, row after row."""
  parts = []
  for tokens, lengths in rows:
    assert sum(lengths) == len(tokens)
    parts += [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
  return parts


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12))
def test_the_stream_is_that_of_the_rows_in_memory(sizes, length):
  documents = numbered(sizes)
  rows = list(Stream().rows(documents, length))
  # pack() adds the end of text that a document has here already.
  expected = pack([d[:-1] for d in documents], length, eos_id=-1, pad_id=-2)
  assert len(rows) == len(expected)
  for (tokens, lengths), row, ids in zip(rows, expected.tokens, expected.segment_ids, strict=True):
    same = row[: len(tokens)] == tokens
    assert (same | (row[: len(tokens)] == -1)).all() and (ids[len(tokens) :] == 0).all()
    assert np.repeat(np.arange(1, len(lengths) + 1), lengths).tolist() == ids[ids > 0].tolist()
  assert all(len(tokens) == length for tokens, _ in rows[:-1])


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12), st.integers(1, 6))
def test_best_fit_cuts_only_what_is_longer_than_a_row(sizes, length, window):
  documents = numbered(sizes)
  rows = list(BestFit(window=window).rows(documents, length))
  assert all(1 <= len(tokens) <= length for tokens, _ in rows)
  expected = Counter(
    tuple(document[start : start + length])
    for document in documents
    for start in range(0, len(document), length)
  )
  assert Counter(map(tuple, segments(rows))) == expected


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12))
def test_no_two_rows_of_a_best_fit_would_fit_into_one(sizes, length):
  rows = list(BestFit(window=1000).rows(numbered(sizes), length))
  filled = sorted(len(tokens) for tokens, _ in rows)
  assert len(filled) == 1 or filled[0] + filled[1] > length


def test_best_fit_puts_a_document_where_the_least_room_stays():
  # Longest first: 7 (room 3), 5 (room 5); then 3 joins 7.
  rows = list(BestFit().rows(numbered([5, 3, 7]), 10))
  assert sorted(sorted(lengths) for _, lengths in rows) == [[3, 7], [5]]
  # The rows come in the order of the first document of each.
  assert [tokens[0] for tokens, _ in rows] == [0, 5]


def test_nothing_gives_no_rows():
  for packing in (Stream(), BestFit()):
    assert list(packing.rows([], 4)) == []


def test_a_window_has_a_row():
  with pytest.raises(ValueError, match="window is at least 1 row, got 0"):
    BestFit(window=0)
