"""Answers: blocks in, text and its end out."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from lladax.data import Bytes
from lladax.infer.earlier import Earlier
from lladax.infer.engine import Update
from lladax.serve import Answer

EOS = 256
decode = Bytes().decode


def blocks(ids, *, width, first=0, at=0):
  """Updates of a row whose columns from `at` on hold `ids`, the first of them called `first`."""
  updates = []
  for start in range(0, len(ids), width):
    part = ids[start : start + width]
    updates.append(
      Update(
        ticket=0, first=first + start, tokens=part, revealed_at=[start + i for i in range(len(part))],
        confidence=[0.5] * len(part), done=start + width >= len(ids), nfe=start + width,
      )
    )  # fmt: skip
  return updates


def collect(answer, updates):
  deltas = []
  for update in updates:
    deltas.append(answer.take(update))
    if answer.finish_reason:
      break
  return deltas


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  st.lists(st.sampled_from([*range(97, 100), 0xC3, 0xA9, EOS]), min_size=1, max_size=24),
  st.integers(1, 8),
  st.integers(1, 24),
  st.lists(st.sampled_from(["b", "ab", "aa", "é"]), max_size=2),
)
def test_blocks_of_any_width_give_the_same_answer(ids, width, length, stop):
  length = min(length, len(ids))
  make = {"first": 0, "length": length, "eos_ids": (EOS,), "stop": stop}
  answer, whole = Answer(decode, **make), Answer(decode, **make)
  deltas = collect(answer, blocks(ids, width=width))
  collect(whole, blocks(ids, width=len(ids)))
  assert "".join(delta.text for delta in deltas) == answer.text == whole.text
  assert answer.finish_reason == whole.finish_reason is not None
  assert answer.tokens == whole.tokens <= length
  expected = ids[:length]
  if EOS in expected:
    expected = expected[: expected.index(EOS)]
  if not stop:
    assert answer.text == decode(expected)
    assert (answer.finish_reason == "stop") == (EOS in ids[:length])
  frames = [delta.frames for delta in deltas]
  assert sum((part["tokens"] for part in frames), []) == answer.frames["tokens"]
  assert [part["first"] for part in frames] == [
    sum(len(before["tokens"]) for before in frames[:i]) for i in range(len(frames))
  ]
  # But for a character that never came to its end.
  assert "".join(answer.frames["texts"]).startswith(answer.text.rstrip("\ufffd"))
  assert answer.frames["revealed_at"] == list(range(len(answer.frames["tokens"])))


def test_a_filled_gap_is_the_answer_and_not_what_surrounds_it():
  row = list(b"given gap suffix")
  answer = Answer(decode, first=6, length=3, eos_ids=(EOS,))
  deltas = collect(answer, blocks(row, width=4))
  assert answer.text == "gap" and answer.finish_reason == "length"
  assert [delta.text for delta in deltas] == ["", "ga", "p"]  # the suffix need not be waited for
  assert answer.frames["revealed_at"] == [6, 7, 8]


def test_a_block_that_holds_the_end_of_the_prompt_counts_from_the_answer():
  answer = Answer(decode, first=0, length=4, eos_ids=(EOS,))
  collect(answer, blocks(list(b"pqabcd"), width=4, first=-2))
  assert answer.text == "abcd" and answer.finish_reason == "length"


def test_frames_tell_what_was_there_before():
  answer = Answer(decode, first=0, length=3, eos_ids=(EOS,))
  first, second = blocks(list(b"pabcd"), width=3, first=-1)
  before = [Earlier(place=2, at=0, token=120, confidence=0.123456)]
  one = answer.take(dataclasses.replace(first, earlier=before)).frames["earlier"]
  before = [
    Earlier(place=0, at=3, token=None, confidence=0.0),
    Earlier(place=1, at=3, token=120, confidence=0.5),  # longer than asked for
  ]
  two = answer.take(dataclasses.replace(second, earlier=before)).frames["earlier"]
  assert one == [{"place": 1, "at": 0, "text": "x", "confidence": 0.1235}]
  assert two == [{"place": 0, "at": 3, "text": None, "confidence": 0.0}]
  assert answer.frames["earlier"] == [*one, {**two[0], "place": 2}]


def test_a_lost_block_is_an_error():
  answer = Answer(decode, first=0, length=8, eos_ids=(EOS,))
  first, second, _ = blocks(list(b"abcdef"), width=2)
  answer.take(first)
  with pytest.raises(ValueError, match="begins at 4, 2 columns late"):
    answer.take(blocks(list(b"ef"), width=2, first=4)[0])
  answer.take(second)
  assert answer.text == "abcd"


def test_what_comes_after_the_end_changes_nothing():
  answer = Answer(decode, first=0, length=2, eos_ids=(EOS,))
  for update in blocks(list(b"abcdef"), width=2):
    answer.take(update)
  assert (answer.text, answer.nfe, answer.tokens) == ("ab", 2, 2)
