"""Laws of the pipeline: a batch is a function of (seed, step), however many processes share it."""

import dataclasses
import io
import itertools
import json
import sys

import jax
import numpy as np
import pytest

from lladax.config import from_json, to_json
from lladax.data import text
from lladax.data.pipeline import load_data
from lladax.data.text import DataConfig, TextData, tokenize
from lladax.data.tokenizer import Bytes
from lladax.data.transforms import Rows, pack, unpack

PAD = 256
CONFIG = DataConfig(batch_size=8, length=6, random_length=0.3, shortest=2, seed=5)


def numbered_rows(count, length=6):
  """Row i holds 6 i, 6 i + 1, ..., so that a token tells its row and column."""
  tokens = np.arange(count * length, dtype=np.int32).reshape(count, length)
  return Rows(tokens, np.ones_like(tokens), tokens % length)


ROWS = numbered_rows(21)  # not a multiple of the batch


def numbered_data(config=CONFIG, rows=ROWS, heldout_rows=ROWS):
  return TextData(
    config=config,
    tokenizer=Bytes(),
    train_documents=[],
    heldout_documents=[],
    train_rows=rows,
    heldout_rows=heldout_rows,
  )


def own_rows(index, count, batch_size=8):
  """Rows of process `index` of `count`."""
  return np.split(np.arange(batch_size), count)[index]


def batches(config=CONFIG, rows=ROWS, *, count=8, start=0, process=(0, 1)):
  iterator = numbered_data(config, rows).train_iterator(rows=own_rows(*process, config.batch_size))
  if start:
    iterator.set_state({"next_index": start})
  return list(itertools.islice(iterator, count))


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def join(parts):
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


# --- training batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_together_give_the_batch_of_one(count):
  parts = [batches(process=(index, count)) for index in range(count)]
  assert all(batch.tokens.shape == (8 // count, 6) for part in parts for batch in part)
  assert_equal([join(step) for step in zip(*parts, strict=True)], batches())


def test_processes_may_share_rows_and_hold_them_in_pieces():
  whole = batches()
  for own in ([0, 1, 6, 7], [3], [0, 2, 4, 6]):
    part = list(itertools.islice(numbered_data().train_iterator(rows=np.array(own)), 8))
    assert_equal(part, [jax.tree.map(lambda x, own=own: x[own], batch) for batch in whole])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_resuming_gives_the_same_continuation_on_any_number_of_processes(count):
  iterator = numbered_data().train_iterator(rows=own_rows(1, 2))
  for _ in range(5):
    next(iterator)
  key = iterator._data.mixture.parts[0].key
  state = json.loads(json.dumps(iterator.get_state()))
  assert state == {"next_index": 5, "start": {}, "drawn": {key: 40}}  # the same on every process
  parts = []
  for index in range(count):
    resumed = numbered_data().train_iterator(rows=own_rows(index, count))
    next(resumed)  # an iterator in use can be set as well
    resumed.set_state(state)
    assert resumed.get_state() == state
    parts.append(list(itertools.islice(resumed, 3)))
  assert_equal([join(step) for step in zip(*parts, strict=True)], batches()[5:])


def test_a_new_stage_goes_on_with_the_next_row():
  whole = numbered_data(dataclasses.replace(CONFIG, random_length=0.0))
  expected = list(itertools.islice(whole.train_iterator(), 9))
  first, second = whole.train_iterator(), whole.train_iterator()
  for _ in range(4):
    next(first)
  second.continue_after(first.get_state())
  assert second.get_state()["next_index"] == 0 and second.epochs() == first.epochs()
  assert_equal(list(itertools.islice(second, 5)), expected[4:])
  resumed = whole.train_iterator()
  resumed.set_state(second.get_state())
  assert resumed.get_state()["drawn"] == {whole.mixture.parts[0].key: 72}
  assert resumed.epochs() == {"shakespeare": 72 / 21}


def test_a_state_of_another_batch_size_is_refused():
  iterator = numbered_data().train_iterator()
  next(iterator)
  state = iterator.get_state()
  other = numbered_data(dataclasses.replace(CONFIG, batch_size=4)).train_iterator()
  with pytest.raises(ValueError, match="another batch size"):
    other.set_state(state)
  assert other.get_state()["next_index"] == 0


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_prefetching_changes_nothing(prefetch):
  assert_equal(batches(dataclasses.replace(CONFIG, prefetch=prefetch)), batches())


def drawn_rows(config, count):
  """Numbers of the rows in `count` batches, from the first token of each, which no crop removes."""
  return np.concatenate([batch.tokens[:, 0] // 6 for batch in batches(config, count=count)])


def test_every_epoch_has_every_row_once_in_its_own_order():
  epochs = drawn_rows(CONFIG, 21).reshape(8, 21)  # 21 batches of 8 are 8 epochs of 21
  for epoch in epochs:
    assert sorted(epoch) == list(range(21))
  assert len({tuple(epoch) for epoch in epochs}) == 8
  assert all(list(epoch) != list(range(21)) for epoch in epochs)


def test_seeds_have_unrelated_orders():
  orders = [
    drawn_rows(dataclasses.replace(CONFIG, seed=seed), 21).reshape(8, 21) for seed in range(4)
  ]
  assert len({tuple(epoch) for epochs in orders for epoch in epochs}) == 4 * 8


def test_crops_pad_the_tail_and_leave_the_rest_alone():
  kept, drawn = [], drawn_rows(CONFIG, 60)
  for batch in batches(count=60):
    for tokens, segments, positions, maskable in zip(
      batch.tokens, batch.segment_ids, batch.positions, batch.maskable, strict=True
    ):
      length = int(segments.sum())
      row = ROWS.tokens[tokens[0] // 6]
      assert tokens.tolist() == [*row[:length], *[PAD] * (6 - length)]
      assert segments.tolist() == [1] * length + [0] * (6 - length)
      assert positions.tolist() == [*range(length), *[0] * (6 - length)]
      assert maskable.tolist() == [True] * length + [False] * (6 - length)
      kept.append(length)
  assert min(kept) == 2
  # U{2..6} leaves a row whole in a fifth of the crops.
  expected = 0.3 * 4 / 5
  assert abs(np.mean(np.array(kept) < 6) - expected) < 4 * np.sqrt(expected / len(kept))
  # Another draw of the same row is cropped for itself.
  lengths_of_row_0 = {length for length, row in zip(kept, drawn, strict=True) if row == 0}
  assert len(lengths_of_row_0) > 1


def test_a_batch_larger_than_the_corpus():
  config = dataclasses.replace(CONFIG, random_length=0.0)
  (batch,) = batches(config, numbered_rows(3), count=1)
  numbers, counts = np.unique(batch.tokens[:, 0] // 6, return_counts=True)
  assert numbers.tolist() == [0, 1, 2] and counts.sum() == 8 and counts.min() == 2


@pytest.mark.parametrize(
  ("own", "message"),
  [
    ([0, 8], "rows of a batch of 8"),
    ([-1, 2], "rows of a batch of 8"),
    ([], "rows of a batch of 8"),
    ([1, 1], "increase"),
    ([2, 0], "increase"),
  ],
)
def test_rows_that_no_process_feeds(own, message):
  with pytest.raises(ValueError, match=message):
    numbered_data().train_iterator(rows=np.array(own))


def test_no_text_to_train_on():
  with pytest.raises(ValueError, match="no text to train on"):
    batches(rows=numbered_rows(0))


# --- held-out batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_heldout_rows_come_once_and_in_order(count):
  parts = [
    list(numbered_data().heldout_iterator(rows=own_rows(index, count))) for index in range(count)
  ]
  steps = [join(step) for step in zip(*parts, strict=True)]
  assert [batch.tokens.shape for batch in steps] == [(8, 6)] * 3
  whole = join(steps)
  assert np.array_equal(whole.tokens[:21], ROWS.tokens)
  assert np.array_equal(whole.positions[:21], ROWS.positions)
  assert np.array_equal(whole.segment_ids[:21], ROWS.segment_ids)
  assert not whole.segment_ids[21:].any() and not whole.maskable[21:].any()
  assert set(whole.tokens[21:].flat) == {PAD}


def test_no_heldout_rows():
  data = numbered_data(heldout_rows=numbered_rows(0))
  assert not data.has_heldout and numbered_data().has_heldout
  with pytest.raises(ValueError, match="no held-out text"):
    data.heldout_iterator()


# --- all together --------------------------------------------------------------------------------

WORDS = "the quick brown fox jumps over a lazy dög and walks home\n".split(" ")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
  monkeypatch.setenv("LLADAX_CACHE", str(tmp_path / "cache"))
  random = np.random.default_rng(0)
  for number in range(30):
    text = " ".join(random.choice(WORDS, size=random.integers(20, 60)))
    (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
  return str(tmp_path / "*.txt")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_load_data_keeps_every_byte_on_its_side(corpus, tokenizer):
  config = DataConfig(corpus=corpus, tokenizer=tokenizer, length=16, heldout=0.1, batch_size=4)
  data = load_data(config)
  for rows, documents, joined in (
    (data.train_rows, data.train_documents, data.train_text),
    (data.heldout_rows, data.heldout_documents, data.heldout_text),
  ):
    ids = unpack(rows, eos_id=data.tokenizer.eos_id)
    assert [data.tokenizer.decode(part) for part in ids] == [d.text for d in documents]
    assert data.text_bytes(rows) == len(joined.encode())
  assert data.heldout_bytes == len(data.heldout_text.encode())
  assert sum(data.text_bytes(batch) for batch in data.heldout_iterator()) == data.heldout_bytes
  assert 0.05 < data.heldout_bytes / (data.heldout_bytes + len(data.train_text.encode())) < 0.15


def test_heldout_text_does_not_reach_the_tokenizer(corpus, monkeypatch):
  seen = []

  def make_tokenizer(spec, texts, **names):
    seen.extend(texts)
    return Bytes()

  monkeypatch.setattr(text, "make_tokenizer", make_tokenizer)
  data = load_data(DataConfig(corpus=corpus, heldout=0.2))
  assert seen == [document.text for document in data.train_documents]
  assert data.heldout_documents


def test_iterators_of_the_bundle(corpus):
  data = load_data(DataConfig(corpus=corpus, length=16, batch_size=4))
  uninterrupted = list(itertools.islice(data.train_iterator(), 6))
  assert data.epochs(0) == {"*.txt": 0} and data.epochs(len(data.train_rows)) == {"*.txt": 4}
  half = next(data.train_iterator(rows=np.array([2, 3])))
  assert np.array_equal(half.tokens, uninterrupted[0].tokens[2:])


def test_load_data_twice_is_the_same(corpus):
  config = DataConfig(corpus=corpus, tokenizer="bpe:300", length=16)
  first, second = load_data(config), load_data(config)
  assert np.array_equal(first.train_rows.tokens, second.train_rows.tokens)
  assert np.array_equal(first.heldout_rows.tokens, second.heldout_rows.tokens)


def test_the_seed_of_the_order_leaves_the_heldout_text_alone(corpus):
  first, second = (load_data(DataConfig(corpus=corpus, seed=seed, length=16)) for seed in (0, 1))
  assert first.heldout_text == second.heldout_text
  orders = [next(data.train_iterator()).tokens for data in (first, second)]
  assert not np.array_equal(*orders)


def test_a_tokenizer_can_be_given(corpus):
  data = load_data(DataConfig(corpus=corpus, tokenizer="bpe:300"), tokenizer=Bytes())
  assert isinstance(data.tokenizer, Bytes)


def test_a_model_vocabulary_below_the_ids_is_refused(corpus):
  load_data(DataConfig(corpus=corpus), vocab_size=258)
  with pytest.raises(ValueError, match="id 257, and the vocabulary has 257 ids"):
    load_data(DataConfig(corpus=corpus), vocab_size=257)


def test_bytes_of_a_tokenizer_that_does_not_tell(corpus):
  class Opaque(Bytes):
    byte_lengths = None

  data = load_data(DataConfig(corpus=corpus), tokenizer=Opaque())
  with pytest.raises(ValueError, match="not byte-level"):
    data.text_bytes(data.heldout_rows)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("length", 0),
    ("batch_size", -4),
    ("shortest", 0),
    ("seed", -1),
    ("split_seed", -2),
    ("prefetch", -3),
    ("heldout", 1.5),
    ("random_length", 2.0),
  ],
)
def test_bad_config_values_are_named(name, value):
  with pytest.raises(ValueError, match=f"{name} is .*got {value}"):
    DataConfig(**{name: value})


@pytest.mark.parametrize(("is_terminal", "seconds"), [(True, 2.0), (True, 0.1), (False, 2.0)])
def test_progress_shows_on_a_terminal_when_it_takes_long(monkeypatch, is_terminal, seconds):
  screen = io.StringIO()
  screen.isatty = lambda: is_terminal
  clock = itertools.count(step=seconds)
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr(text.time, "monotonic", lambda: next(clock))
  tokens = tokenize(["ab" * 600_000, "", "c"], Bytes())
  assert [len(ids) for ids in tokens] == [1_200_000, 0, 1]
  assert ("tokenizing" in screen.getvalue()) == (is_terminal and seconds > 1)


def test_real_rows_of_a_real_tokenizer_never_leak_padding():
  documents = Bytes().encode_batch(["one document", "another", "x" * 50])
  rows = pack(documents, 16, eos_id=256, pad_id=256)
  config = DataConfig(length=16, batch_size=2, random_length=1.0, shortest=1)
  for batch in batches(config, rows, count=20):
    assert not batch.maskable[batch.segment_ids == 0].any()
    assert (batch.tokens[batch.segment_ids == 0] == PAD).all()


def test_configs_that_were_saved_before_the_class_moved():
  saved = to_json(CONFIG).replace("lladax.data.text:", "lladax.data.pipeline:")
  assert "lladax.data.pipeline:DataConfig" in saved and from_json(saved) == CONFIG
