"""The viewer: one glyph per mask, given text intact, plain lines without a terminal."""

import dataclasses
import io

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from finished import MASK, decode, result_of
from rich.console import Console

from lladax.infer.earlier import Shown, shown
from lladax.infer.generate import Trail
from lladax.infer.replay import replay_of
from lladax.infer.view import (
  MASK_GLYPH,
  crystallising,
  frames,
  render,
  shade,
  show,
  styled_frames,
)

text_and_order = st.text(
  st.characters(exclude_characters=MASK_GLYPH, exclude_categories=["Cs", "Cc"]), max_size=12
).flatmap(
  lambda text: st.tuples(
    st.just(text),
    st.lists(st.integers(-1, 4), min_size=len(text.encode()), max_size=len(text.encode())),
  )
)


@pytest.mark.quick
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(text_and_order)
def test_one_glyph_per_mask_and_the_text_between_masks_intact(sample):
  text, when = sample
  result = result_of(text, when)
  canvases, shown = result.frames(0), frames(result, decode)
  assert len(shown) == len(canvases) == max(when, default=-1) + 2
  for ids, line in zip(canvases.tolist(), shown, strict=True):
    assert line.count(MASK_GLYPH) == ids.count(MASK)
    stretches = [[]]
    for token in ids:
      stretches.append([]) if token == MASK else stretches[-1].append(token)
    assert line.split(MASK_GLYPH) == [decode(stretch) for stretch in stretches]
  assert shown[-1] == text


def test_what_a_model_writes_gives_the_terminal_no_orders():
  places = [Shown(text, 0, 1.0) for text in ("\x1b[2J", "a\n", "\x9b1m")]
  assert crystallising(places, 1).plain == "\u241b[2Ja\n\ufffd1m"
  result = result_of("\x1bc", [0, 0])
  assert list(styled_frames(result, decode))[-1].plain == "\u241bc"


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(text_and_order)
def test_styled_frames_say_the_same_as_plain_ones(sample):
  result = result_of(*sample)
  assert [text.plain for text in styled_frames(result, decode)] == frames(result, decode)


def test_styles_tell_given_fresh_written_and_masked_apart():
  result = result_of("abcd", [-1, 0, 1, 2])
  first, second, third, last = styled_frames(result, decode)
  assert first.plain == "a" + 3 * MASK_GLYPH
  styles = {span.start: span.style for span in third.spans}
  assert styles == {1: "cyan", 2: "bold green", 3: "dim"}
  assert "dim" not in {span.style for span in last.spans}
  assert second.plain == "ab" + 2 * MASK_GLYPH


def test_a_token_that_was_written_and_written_again_is_shown_as_it_was():
  result = result_of("ad", [0, 2])
  trail = Trail(
    column=np.array([2]),  # behind the padding
    iterations=np.array([3]),
    tokens=np.array([[[97, 98]], [[97, MASK]], [[97, 100]]]),
    confidence=np.array([[[0.9, 0.2]], [[0.9, 0.0]], [[0.9, 0.8]]]),
  )
  result = dataclasses.replace(result, trail=(trail,))
  screens = list(styled_frames(result, decode))
  assert [text.plain for text in screens] == [2 * MASK_GLYPH, "ab", "a" + MASK_GLYPH, "ad"]
  assert [text.plain for text in screens] == frames(result, decode)
  styles = [{span.start: span.style for span in text.spans} for text in screens]
  assert styles[1:] == [{0: "bold green"}, {0: "cyan", 1: "dim"}, {0: "cyan", 1: "bold green"}]
  replay = replay_of(result, decode)
  for number, text in enumerate(screens):
    assert crystallising(replay.shown(number), number).plain == text.plain
  assert replay.shown(1)[1] == Shown("b", 0, 0.2)


def test_a_character_whose_bytes_come_one_by_one_is_shown_whole_in_the_end():
  result = result_of("né", [-1, 0, 1])
  assert frames(result, decode)[-1] == "né"
  assert list(styled_frames(result, decode))[-1].plain == "né"


def test_plain_lines_where_there_is_no_terminal():
  out = io.StringIO()
  result = result_of("hello [bold]", list(range(12)))
  show(result, decode, title="from nothing", plain_frames=3, console=Console(file=out, width=10))
  lines = out.getvalue().splitlines()
  assert lines == [
    "from nothing",
    "[0/12] " + 12 * MASK_GLYPH,
    "[6/12] hello " + 6 * MASK_GLYPH,
    "[12/12] hello [bold]",
  ]


def test_a_terminal_gets_an_animation_that_ends_with_the_text():
  out = io.StringIO()
  console = Console(file=out, force_terminal=True, width=40, color_system=None)
  show(result_of("hello", [0, 1, 0, 1, 1]), decode, seconds=0.0, console=console)
  assert "hello" in out.getvalue()
  assert "5 masked" in out.getvalue() and "0 masked" in out.getvalue()


def test_render_of_nothing():
  assert render([], decode, mask_id=MASK) == ""
  assert render([MASK] * 3, decode, mask_id=MASK) == 3 * MASK_GLYPH


def test_confidence_goes_from_red_to_green():
  shades = [shade(c) for c in (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0)]
  assert shades[0] == shades[1] and shades[-1] == shades[-2]
  greenness = [green - red for red, green, _ in shades[1:-1]]
  assert greenness == sorted(greenness) and greenness[0] < 0 < greenness[-1]
  assert all(0 <= part <= 255 for colour in shades for part in colour)


def test_a_canvas_crystallises():
  columns = (["a", "b", "", "é"], [-1, 0, 1, 2], [0.0, 1.0, 0.5, 0.0])
  text = crystallising(shown(*columns, 1), 1)
  assert text.plain == "ab" + 2 * MASK_GLYPH
  red, green, blue = shade(1.0)
  spans = [(span.start, span.end, span.style) for span in text.spans]
  assert spans == [(1, 2, f"bold rgb({red},{green},{blue})"), (2, 4, "dim")]
  last = crystallising(shown(*columns, 3), 3)
  assert last.plain == "abé" and "dim" not in {span.style for span in last.spans}
