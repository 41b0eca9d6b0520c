"""Laws of splitting, packing and cropping: nothing lost, nothing mixed, nothing random twice."""

import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lladax.data import transforms
from lladax.data.corpora import Document
from lladax.data.transforms import (
  check_ids,
  crop_length,
  make_batch,
  pack,
  split_documents,
  unpack,
)

EOS, PAD = 90, 91
token_lists = st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=8)
lengths = st.integers(1, 12)


def packed(documents, length):
  return pack(documents, length, eos_id=EOS, pad_id=PAD)


# --- pack ----------------------------------------------------------------------------------------


@hypothesis.given(documents=token_lists, length=lengths)
def test_packing_loses_nothing(documents, length):
  rows = packed(documents, length)
  assert [part.tolist() for part in unpack(rows, eos_id=EOS)] == documents
  assert rows.num_tokens == sum(len(document) + 1 for document in documents)
  assert len(rows) == -(-rows.num_tokens // length)


@hypothesis.given(documents=token_lists, length=lengths)
def test_packing_equals_a_loop_over_tokens(documents, length):
  tokens, segment_ids, positions = [], [], []
  for document in documents:
    for place, token in enumerate([*document, EOS]):
      if len(tokens) % length == 0:
        segment, position = 1, 0
      elif place == 0:
        segment, position = segment_ids[-1] + 1, 0
      else:
        segment, position = segment_ids[-1], positions[-1] + 1
      tokens.append(token)
      segment_ids.append(segment)
      positions.append(position)
  padding = -len(tokens) % length
  expected = [tokens + [PAD] * padding, segment_ids + [0] * padding, positions + [0] * padding]
  rows = packed(documents, length)
  for array, values in zip((rows.tokens, rows.segment_ids, rows.positions), expected, strict=True):
    assert array.dtype == np.int32 and array.shape == (len(rows), length)
    assert array.reshape(-1).tolist() == values


@hypothesis.given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), length=lengths)
def test_segments_never_mix_documents(sizes, length):
  rows = packed([[number] * size for number, size in enumerate(sizes)], length)
  for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True):
    for segment in range(1, segments.max() + 1):
      assert len(set(tokens[segments == segment]) - {EOS}) <= 1


def test_documents_longer_than_a_row_are_reported(monkeypatch):
  lines = []

  def report(message, *values):
    lines.append(message % values)

  monkeypatch.setattr(transforms.logging, "info", report)
  packed([[1] * 9, [2], [3] * 3], 4)  # rows: 1111 1111 1$2$ 333$
  assert lines == [
    "packed 3 documents (16 tokens) into 4 rows of 4: 1 documents were cut, into 3 pieces"
  ]


def test_rows_need_a_length():
  with pytest.raises(ValueError, match="at least 1 token, got 0"):
    packed([[1]], 0)


@hypothesis.given(documents=token_lists, vocab_size=st.integers(1, 10))
def test_ids_must_fit_the_vocabulary(documents, vocab_size):
  tokens = np.array([token for document in documents for token in document], np.int32)
  largest = max(tokens, default=0)
  if largest < vocab_size:
    check_ids(tokens, vocab_size)
  else:
    with pytest.raises(ValueError, match=f"id {largest}, and the vocabulary has {vocab_size}"):
      check_ids(tokens, vocab_size)


# --- make_batch ----------------------------------------------------------------------------------


def test_a_batch_holds_the_rows_asked_for_and_padding_elsewhere():
  rows = packed([[1, 2, 3], [4], [5] * 9], 6)
  batch = make_batch(rows, np.array([2, -1, 0]), pad_id=PAD, lengths=np.array([2, 6, 5]))
  assert batch.tokens.tolist() == [
    [5, 5, PAD, PAD, PAD, PAD],
    [PAD] * 6,
    [1, 2, 3, EOS, 4, PAD],
  ]
  assert batch.segment_ids.tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6, [1, 1, 1, 1, 2, 0]]
  assert batch.positions.tolist() == [[0, 1, 0, 0, 0, 0], [0] * 6, [0, 1, 2, 3, 0, 0]]
  assert np.array_equal(batch.maskable, batch.segment_ids > 0)
  assert batch.tokens.dtype == batch.segment_ids.dtype == batch.positions.dtype == np.int32
  assert batch.maskable.dtype == bool


def test_a_batch_is_a_copy():
  rows = packed([[1, 2, 3]], 4)
  make_batch(rows, np.array([0]), pad_id=PAD).tokens[:] = 7
  assert rows.tokens.tolist() == [[1, 2, 3, EOS]]


# --- crop ----------------------------------------------------------------------------------------


def crops(seed, count, **changes):
  arguments = {"length": 64, "probability": 0.01, "shortest": 8, **changes}
  return np.array([crop_length(seed, draw, **arguments) for draw in range(count)])


def test_crops_come_at_their_rate():
  rate = np.mean(crops(0, 20_000, length=10_000) < 10_000)
  assert abs(rate - 0.01) < 4 * np.sqrt(0.01 * 0.99 / 20_000)


def test_cropped_lengths_are_uniform_over_their_range():
  drawn = crops(0, 8_000, length=15, probability=1.0)
  values, counts = np.unique(drawn, return_counts=True)
  assert values.tolist() == list(range(8, 16))
  assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_crops_depend_on_seed_and_draw_only():
  whole = crops(3, 300, probability=0.5)
  backwards = [
    crop_length(3, draw, length=64, probability=0.5, shortest=8) for draw in reversed(range(300))
  ]
  assert whole.tolist() == backwards[::-1]
  assert (whole != crops(4, 300, probability=0.5)).any()


def test_crops_at_the_ends():
  assert set(crops(0, 50, probability=0.0)) == {64}
  assert set(crops(0, 50, probability=1.0, length=5)) == {5}  # shorter than the shortest crop


# --- split ---------------------------------------------------------------------------------------


def documents_of(sizes):
  return [Document(f"{i}", f"{i:04}".ljust(size, "x")) for i, size in enumerate(sizes)]


many_sizes = st.lists(st.integers(4, 400), min_size=2, max_size=60)


@hypothesis.given(many_sizes, st.floats(0.0, 0.5), st.integers(0, 1000))
def test_split_is_a_partition_by_whole_documents(sizes, heldout, seed):
  documents = documents_of(sizes)
  train, held = split_documents(documents, heldout, seed)
  assert sorted(train + held, key=lambda d: int(d.name)) == documents
  assert bool(held) == (heldout > 0)
  assert train


@hypothesis.given(many_sizes, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_split_ignores_order_and_names(sizes, seed, shuffler):
  documents = documents_of(sizes)
  _, held = split_documents(documents, 0.2, seed)
  moved = [Document(f"folder/{d.name}", d.text) for d in documents]
  shuffler.shuffle(moved)
  assert {d.text for d in split_documents(moved, 0.2, seed)[1]} == {d.text for d in held}


@pytest.mark.parametrize("seed", range(5))
def test_split_holds_out_the_fraction_asked_for(seed):
  sizes = random.Random(seed).choices(range(50, 150), k=400)
  documents = documents_of([*sizes, 20_000])  # one of them above twice the goal
  total = sum(document.num_bytes for document in documents)
  _, held = split_documents(documents, 0.05, seed)
  assert abs(sum(d.num_bytes for d in held) / total - 0.05) < 0.002
  assert all(document.num_bytes < 20_000 for document in held)


def test_split_depends_on_the_seed():
  documents = documents_of([100] * 200)
  chosen = [{d.name for d in split_documents(documents, 0.1, seed)[1]} for seed in range(5)]
  assert all(len(names) == 20 for names in chosen)
  assert len(set(map(frozenset, chosen))) == 5
  # Chance alone would share 2 of 20 names.
  assert len(chosen[0] & chosen[1]) < 10


def test_split_is_hardly_moved_by_one_more_document():
  documents = documents_of([100] * 200)
  held = {d.name for d in split_documents(documents, 0.1, 0)[1]}
  more = {d.name for d in split_documents([*documents, Document("new", "y" * 100)], 0.1, 0)[1]}
  assert len(held - more) <= 1


@pytest.mark.parametrize("seed", range(10))
def test_equal_texts_stay_on_one_side(seed):
  documents = documents_of([50] * 10) * 3
  train, held = split_documents(documents, 0.3, seed)
  assert not {d.text for d in train} & {d.text for d in held}
  assert len(held) == 9


def test_large_documents_only():
  documents = documents_of([1000, 900])
  train, held = split_documents(documents, 0.05, 0)
  assert [d.num_bytes for d in train] == [1000] and [d.num_bytes for d in held] == [900]


@pytest.mark.parametrize("heldout", [-0.1, 1.0])
def test_split_fraction_is_checked(heldout):
  with pytest.raises(ValueError, match=f"below 1; got {heldout}"):
    split_documents(documents_of([10, 10]), heldout, 0)


def test_split_needs_two_texts():
  with pytest.raises(ValueError, match="there is only 1.*heldout=0"):
    split_documents(documents_of([10]) * 2, 0.05, 0)


def test_split_leaves_text_to_train_on():
  with pytest.raises(ValueError, match="heldout=0.999 leaves no text"):
    split_documents(documents_of([10, 10]), 0.999, 0)
