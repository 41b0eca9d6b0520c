"""Replays: a page that loads nothing and means what was written, and a GIF with every frame."""

import dataclasses
import html.parser
import json

import numpy as np
import pytest
from finished import decode, result_of
from PIL import Image

from lladax.infer.earlier import EarlierText
from lladax.infer.replay import Replay, replay_of, save_gif, save_html, to_html

HARD = Replay(
  texts=["</script>", "<b>&amp;", "\u2028", "né"],
  revealed_at=[-1, 0, 2, 1],
  confidence=[0.0, 0.91239, 0.5, 1.0],
  nfe=3,
  prompt="say </script><script>alert(1)",
  earlier=[EarlierText(place=2, at=0, text="</script>", confidence=0.25)],
)


class Page(html.parser.HTMLParser):
  """The scripts of a page, and every address that it names."""

  def __init__(self, text):
    super().__init__()
    self.scripts, self.addresses, self._inside = [], [], False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self._inside = tag == "script"
    if self._inside:
      self.scripts.append("")
    self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]

  def handle_endtag(self, tag):
    self._inside = False

  def handle_data(self, data):
    if self._inside:
      self.scripts[-1] += data


def test_the_page_holds_its_data_whatever_the_text_is(tmp_path):
  save_html(tmp_path / "a.html", [HARD, HARD], title="a <title>")
  text = (tmp_path / "a.html").read_text(encoding="utf-8")
  page = Page(text)
  assert json.loads(page.scripts[0]) == [HARD.to_tree()] * 2
  assert len(page.scripts) == 2  # data and player: no text became a script
  assert "a &lt;title&gt;" in text


def test_the_page_loads_nothing():
  page = to_html([HARD])
  assert Page(page).addresses == []
  assert "http" not in page and "@import" not in page and "url(" not in page


def test_a_replay_of_a_result_is_its_trajectory():
  result = result_of("né a", [-1, 0, 2, 1, 0])
  replay = replay_of(result, decode)
  assert replay.texts == ["n", "", "é", " ", "a"]
  assert replay.revealed_at == [-1, 0, 2, 1, 0]
  assert (replay.iterations, replay.written, replay.nfe) == (3, 4, 3)
  assert len(result.frames(0)) == replay.iterations + 1


def test_a_gif_has_a_frame_per_iteration_and_shows_what_was_written_then(tmp_path):
  first = Replay(texts=["a", "b\n", "\u6f22"], revealed_at=[0, 2, 1], confidence=[1, 0, 1], nfe=3)
  second = Replay(texts=["x"] * 9, revealed_at=range(9), confidence=[1] * 9, nfe=9, prompt="p")
  save_gif(tmp_path / "a.gif", [first, second], columns=8, max_frames=5, last_ms=700)
  with Image.open(tmp_path / "a.gif") as gif:
    frames = []
    durations = []
    for number in range(gif.n_frames):
      gif.seek(number)
      frames.append(np.asarray(gif.convert("RGB")).astype(int))
      durations.append(gif.info["duration"])
  assert len(frames) == 4 + 5
  assert durations == [120, 120, 120, 700] + [120] * 4 + [700]
  assert len({frame.shape for frame in frames}) == 1
  # From one frame of the first replay to the next, a cell changes if its token was written just
  # now, or is no longer fresh.
  height, width = frames[0].shape[0] // 4, frames[0].shape[1] // 10
  cells = {0: (0, 0), 1: (0, 1), 2: (1, 0)}
  for number in range(3):
    difference = abs(frames[number + 1] - frames[number]).max(axis=-1)
    for token, (line, column) in cells.items():
      top, left = line * height + height // 2, (column + 1) * width
      changed = (difference[top : top + height, left : left + width] > 40).any()
      assert changed == (first.revealed_at[token] in (number, number - 1))


def test_a_gif_shows_what_was_there_before(tmp_path):
  plain = Replay(texts=["a", "bcd"], revealed_at=[0, 2], confidence=[1, 1], nfe=3)
  earlier = [
    EarlierText(place=1, at=0, text="xy\nz" * 9, confidence=0.1),
    EarlierText(place=1, at=1, text=None, confidence=0.0),
  ]
  pages = []
  for number, replay in enumerate((plain, dataclasses.replace(plain, earlier=earlier))):
    save_gif(tmp_path / f"{number}.gif", [replay])
    with Image.open(tmp_path / f"{number}.gif") as gif:
      pages.append([])
      for frame in range(gif.n_frames):
        gif.seek(frame)
        pages[-1].append(np.asarray(gif.convert("RGB")))
  same = [np.array_equal(*frames) for frames in zip(*pages, strict=True)]
  assert same == [True, False, True, True]


def test_bad_replays_are_errors(tmp_path):
  with pytest.raises(ValueError, match=r"as many texts \(1\) as iterations \(2\)"):
    Replay(texts=["a"], revealed_at=[0, 1], confidence=[1.0], nfe=1)
  with pytest.raises(ValueError, match="at least one replay"):
    save_gif(tmp_path / "a.gif", [])
