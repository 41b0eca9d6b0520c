"""Text of tokens as they come: the pieces are the whole, and an answer ends where it ends."""

import hypothesis
import hypothesis.strategies as st
import pytest

from lladax.data import Bytes, train_bpe
from lladax.infer.text_stream import AnswerStream, TextStream, token_texts

BYTES = Bytes()
BPE = train_bpe(["to be, or not to be; that is the question, né? " * 4], 300)
# Characters of one to four bytes, and bytes that are no text at all.
ids_of_bytes = st.one_of(
  st.text(max_size=40).map(BYTES.encode), st.lists(st.integers(0, 257), max_size=60)
)


def cut(items, sizes):
  """The items in pieces of these sizes, then the rest."""
  pieces = []
  for size in sizes:
    pieces.append(items[:size])
    items = items[size:]
  return [*pieces, items]


@pytest.mark.quick
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(ids_of_bytes, st.lists(st.integers(0, 5), max_size=30))
def test_pieces_put_together_are_the_text(ids, sizes):
  stream = TextStream(BYTES.decode)
  pieces = [stream.push(piece) for piece in cut(ids, sizes)]
  assert "".join(pieces) + stream.finish() == BYTES.decode(ids)
  assert "".join(token_texts(ids, BYTES.decode)) == BYTES.decode(ids)
  assert len(token_texts(ids, BYTES.decode)) == len(ids)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.integers(2, BPE.vocab_size - 1), max_size=80))
def test_pieces_of_a_byte_level_vocabulary(ids):
  assert "".join(token_texts(ids, BPE.decode)) == BPE.decode(ids)


def test_a_character_comes_whole_with_its_last_byte():
  assert token_texts(list("né€😀".encode()), BYTES.decode) == [
    "n", "", "é", "", "", "€", "", "", "", "😀",
  ]  # fmt: skip


@pytest.mark.quick
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
  st.text("abé", max_size=20),
  st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
  st.lists(st.integers(0, 4), max_size=20),
)
def test_an_answer_ends_before_its_first_stop_string(text, stops, sizes):
  ids = BYTES.encode(text)
  stream = AnswerStream(BYTES.decode, stop=stops)
  settled = [stream.push(piece) for piece in cut(ids, sizes)]
  # What is handed out is never taken back, and no stop string is in it.
  got = "".join(settled) + stream.finish()
  # Token by token: of two stop strings the one counts that is complete first.
  expected = next(
    (
      seen[: min(seen.find(s) for s in stops if s in seen)]
      for seen in (text[:n] for n in range(len(text) + 1))
      if any(s in seen for s in stops)
    ),
    text,
  )
  assert got == expected
  assert stream.stopped == any(stop in text for stop in stops)


def test_an_answer_ends_at_end_of_text_and_hears_nothing_after_it():
  stream = AnswerStream(BYTES.decode, eos_ids=(256,), stop=["xy"])
  assert stream.push([97, 120]) == "a"  # "x" may become "xy"
  assert stream.push([256, 98]) == "x"
  assert stream.ended and stream.stopped and stream.ids == [97, 120]
  assert stream.push([99]) == "" and stream.finish() == ""


def test_an_answer_that_runs_out_has_not_stopped():
  stream = AnswerStream(BYTES.decode, eos_ids=(256,), stop=["b€"])
  assert stream.push([97, 98, 0xE2, 0x82]) == "a"
  assert stream.finish() == "b\ufffd"
  assert stream.ended and not stream.stopped


def test_an_empty_stop_string_is_an_error():
  with pytest.raises(ValueError, match="a stop string is empty"):
    AnswerStream(BYTES.decode, stop=["a", ""])
