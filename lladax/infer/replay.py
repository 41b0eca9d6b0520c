"""A denoising kept: an HTML page that plays it without a network, and a GIF.

Both are made from a `Replay`, which says of every token what it reads, in which iteration it was
written and with which confidence, and the same of what it read before; every frame follows from that.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from lladax.infer.earlier import EarlierText, Shown, earlier_texts, shown
from lladax.infer.generate import GenerateResult
from lladax.infer.text_stream import Decode, token_texts
from lladax.infer.view import pick, shade

PLAYER = pathlib.Path(__file__).with_name("player.js")
STYLE = pathlib.Path(__file__).with_name("player.css")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
  """One row as it was written.

  Attributes:
    texts: what each token reads; "" for one that is part of a character or says nothing.
    revealed_at: the iteration in which it was written, from 0; -1 where it was given.
    confidence: with which it was written.
    nfe: network passes that it took.
    prompt: what stood before, shown above the canvas.
    earlier: what tokens read before they gave way to others, by iteration.
  """

  texts: Sequence[str]
  revealed_at: Sequence[int]
  confidence: Sequence[float]
  nfe: int
  prompt: str = ""
  earlier: Sequence[EarlierText] = ()

  def __post_init__(self):
    if not len(self.texts) == len(self.revealed_at) == len(self.confidence):
      raise ValueError(
        f"a replay has as many texts ({len(self.texts)}) as iterations ({len(self.revealed_at)}) "
        f"and confidences ({len(self.confidence)})"
      )

  @property
  def iterations(self) -> int:
    return max(self.revealed_at, default=-1) + 1

  @property
  def written(self) -> int:
    return sum(at >= 0 for at in self.revealed_at)

  def shown(self, number: int) -> list[Shown | None]:
    """What each token shows before iteration `number`; None for a mask."""
    return shown(self.texts, self.revealed_at, self.confidence, number, self.earlier)

  def to_tree(self) -> dict:
    """Plain JSON values, as the player reads them."""
    return {
      "prompt": self.prompt,
      "nfe": self.nfe,
      "texts": list(self.texts),
      "revealed_at": list(self.revealed_at),
      "confidence": [round(float(c), 4) for c in self.confidence],
      "earlier": [one.to_tree() for one in self.earlier],
    }


def replay_of(result: GenerateResult, decode: Decode, *, row: int = 0) -> Replay:
  """A row of a finished result, what was given and what was written."""
  keep = result.is_text[row]
  return Replay(
    texts=token_texts(result.tokens[row][keep].tolist(), decode),
    revealed_at=result.revealed_at[row][keep].tolist(),
    confidence=result.confidence[row][keep].tolist(),
    nfe=int(result.nfe[row]),
    earlier=earlier_texts(result.earlier(row), decode),
  )


def to_html(replays: Sequence[Replay], *, title: str = "Denoising") -> str:
  """A page that plays the replays one below the other. It loads nothing from anywhere."""
  # "</script>" in a text would end the element that holds it.
  data = json.dumps([replay.to_tree() for replay in replays]).replace("<", "\\u003c")
  return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE.read_text()}</style>
<h1>{html.escape(title)}</h1>
<main id="replays"></main>
<script id="data" type="application/json">{data}</script>
<script>{PLAYER.read_text()}
for (const replay of JSON.parse(document.getElementById("data").textContent))
  document.getElementById("replays").append(replayPlayer(replay));
</script>
</html>
"""


def save_html(path: str | os.PathLike, replays: Sequence[Replay], *, title="Denoising") -> None:
  """Writes `to_html` to a file."""
  pathlib.Path(path).write_text(to_html(replays, title=title), encoding="utf-8")


def save_gif(
  path: str | os.PathLike,
  replays: Sequence[Replay],
  *,
  columns: int = 72,
  max_frames: int = 120,
  frame_ms: int = 120,
  last_ms: int = 2000,
  font: str | None = None,
  font_size: int = 16,
) -> None:
  """Writes an animated GIF, the replays one after the other.

  The text stands where it will stand in the end; what is masked is a bar of that length, and what
  gives way to another token is cut to it.

  Args:
    columns: characters in a line.
    max_frames: of one replay; iterations are left out evenly where there are more.
    frame_ms, last_ms: how long a frame and the last one of a replay are shown, milliseconds.
    font: a TrueType file; default DejaVu Sans Mono where it is installed, else Pillow's own, which
      knows Latin letters only.

  Raises:
    ImportError: without Pillow.
    ValueError: without a replay.
  """
  if not replays:
    raise ValueError("there is nothing to show: give at least one replay")
  pages = [_Page(replay, columns, font, font_size) for replay in replays]
  height = max(page.lines for page in pages)
  images, durations = [], []
  for page, replay in zip(pages, replays, strict=True):
    numbers = pick(np.arange(replay.iterations + 1), max_frames).tolist()
    images += [page.draw(number, height) for number in numbers]
    durations += [frame_ms] * (len(numbers) - 1) + [last_ms]
  images[0].save(
    path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False
  )


BACKGROUND, GIVEN, BAR = (24, 26, 31), (200, 204, 212), (70, 74, 84)


class _Page:
  """A replay laid out in cells of one character, and its frames as images."""

  def __init__(self, replay: Replay, columns: int, font: str | None, font_size: int):
    try:
      from PIL import Image, ImageDraw
    except ImportError as error:
      raise ImportError(
        "a GIF needs Pillow: pip install 'lladax[replay]', or save an HTML replay"
      ) from error
    self._image, self._draw = Image.new, ImageDraw.Draw
    self._font = _font(font, font_size)
    self._cell = (max(round(self._font.getlength("M")), 1), round(font_size * 1.4))
    self._columns = columns
    self._replay = replay
    self._cells = list(_cells(replay, columns))
    self.lines = max((line for _, _, line, _, _ in self._cells), default=0) + 1

  def draw(self, number: int, lines: int):
    """The frame before iteration `number`, on a page of so many lines."""
    width, height = self._cell
    size = ((self._columns + 2) * width, (lines + 1) * height)
    image = self._image("RGB", size, BACKGROUND)
    draw = self._draw(image)
    places = self._replay.shown(number)
    begun: dict[int | None, int] = {}  # cells of each token so far
    for token, character, line, column, wide in self._cells:
      x, y = (column + 1) * width, line * height + height // 2
      place = Shown("", -1, 0.0) if token is None else places[token]
      if place is None:
        bar = (x, y + height // 6, x + width * (1 + wide) - 1, y + height * 5 // 6)
        draw.rectangle(bar, fill=BAR)
        continue
      if token is not None and place.at < self._replay.revealed_at[token]:
        index = begun[token] = begun.get(token, -1) + 1
        character = (" ".join(place.text.splitlines()) + " " * (index + 1))[index]
      colour = GIVEN if place.at < 0 else shade(place.confidence)
      draw.text((x, y), character, fill=colour, font=self._font)
      if place.at == number - 1 >= 0:
        draw.line((x, y + height - 2, x + width * (1 + wide) - 1, y + height - 2), fill=colour)
    return image.quantize(64)


def _font(path: str | None, size: int):
  from PIL import ImageFont

  if path is not None:
    return ImageFont.truetype(path, size)
  try:
    return ImageFont.truetype("DejaVuSansMono.ttf", size)
  except OSError:
    return ImageFont.load_default(size)


def _cells(replay: Replay, columns: int) -> Iterator[tuple[int | None, str, int, int, bool]]:
  """(token or None for the prompt, character, line, column, whether it is two cells wide)."""
  pieces: list[tuple[int | None, str]] = [*enumerate(replay.texts)]
  if replay.prompt:
    pieces.insert(0, (None, replay.prompt.rstrip("\n") + "\n"))
  line = column = 0
  for token, text in pieces:
    for character in text:
      if character == "\n":
        line, column = line + 1, 0
        continue
      wide = unicodedata.east_asian_width(character) in "WF"
      if column + 1 + wide > columns:
        line, column = line + 1, 0
      if not unicodedata.combining(character):
        yield token, " " if character.isspace() else character, line, column, wide
        column += 1 + wide
