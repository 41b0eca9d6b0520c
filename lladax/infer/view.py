"""A canvas as it denoises, in the terminal or as plain strings.

Everything is drawn from a finished `GenerateResult`, which knows when each token was written.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from lladax.infer.earlier import Shown
from lladax.infer.generate import GenerateResult
from lladax.infer.text_stream import Decode

MASK_GLYPH = "░"
STYLES = {"given": "", "written": "cyan", "fresh": "bold green", "masked": "dim"}


def shade(confidence: float) -> tuple[int, int, int]:
  """Red, green and blue of a confidence: red at 0, yellow at a half, green at 1."""
  share = min(max(float(confidence), 0.0), 1.0)
  return round(235 - 140 * max(2 * share - 1, 0)), round(85 + 120 * min(2 * share, 1)), 90


# What a model writes may move the cursor or worse; shown are the pictures of control characters.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def crystallising(places: Sequence[Shown | None], number: int) -> Text:
  """The canvas before iteration `number`: masks dim, text in the colour of its confidence.

  Args:
    places: what each shows, see `lladax.infer.earlier.shown`.
    number: tokens of iteration `number - 1` are the fresh ones, bold.
  """
  styled = []
  for place in places:
    if place is None:
      styled.append((MASK_GLYPH, STYLES["masked"]))
    elif place.at < 0:
      styled.append((place.text, STYLES["given"]))
    else:
      red, green, blue = shade(place.confidence)
      fresh = "bold " if place.at == number - 1 else ""
      styled.append((place.text, f"{fresh}rgb({red},{green},{blue})"))
  text = Text()
  for style, neighbours in itertools.groupby(styled, key=lambda pair: pair[1]):
    text.append("".join(piece for piece, _ in neighbours).translate(PICTURES), style)
  return text


def render(ids: Sequence[int], decode: Decode, *, mask_id: int) -> str:
  """The text of a canvas, one `MASK_GLYPH` per masked token.

  Tokens between two masks are decoded together, so what lies within one stretch reads as it would
  in the finished text, even where a token is only part of a character.
  """
  states = ["masked" if token == mask_id else "written" for token in ids]
  return "".join(text for text, _ in pieces(ids, states, decode))


def frames(
  result: GenerateResult, decode: Decode, *, row: int = 0, count: int | None = None
) -> list[str]:
  """The trajectory of a row as strings, first canvas to last, `count` of them evenly spaced."""
  canvases = pick(result.frames(row), count)
  return [render(ids, decode, mask_id=result.mask_id) for ids in canvases.tolist()]


def show(
  result: GenerateResult,
  decode: Decode,
  *,
  row: int = 0,
  title: str = "",
  seconds: float = 4.0,
  plain_frames: int = 5,
  console: Console | None = None,
) -> None:
  """Plays the denoising of a row: animated in a terminal, else `plain_frames` of it as lines.

  In the terminal masks are dim, the tokens just written are bold and those written before are
  coloured; what was given looks like plain text.

  Args:
    seconds: how long the animation takes.
    console: where to; default a console on stdout.
  """
  console = console or Console()
  if not console.is_terminal:
    show_plain(result, decode, row=row, title=title, count=plain_frames, console=console)
    return
  screens = list(styled_frames(result, decode, row=row))
  masked = np.sum(result.frames(row) == result.mask_id, axis=1)
  with Live(console=console, auto_refresh=False) as live:
    for index, text in enumerate(screens):
      panel = Panel(text, title=title or None, subtitle=f"{masked[index]} masked")
      live.update(panel, refresh=True)
      if index + 1 < len(screens):
        time.sleep(seconds / len(screens))


def show_plain(result, decode, *, row, title, count, console) -> None:
  total = len(result.frames(row)) - 1
  numbers = pick(np.arange(total + 1), count).tolist()
  if title:
    console.print(title, markup=False, highlight=False, soft_wrap=True)
  for number, text in zip(numbers, frames(result, decode, row=row, count=count), strict=True):
    line = f"[{number}/{total}] {text}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def styled_frames(result: GenerateResult, decode: Decode, *, row: int = 0) -> Iterator[Text]:
  """The trajectory of a row as rich `Text`, one per iteration and the first canvas."""
  given = result.revealed_at[row][result.is_text[row]] < 0
  canvases = result.frames(row)
  for before, ids in zip([canvases[0], *canvases], canvases, strict=False):
    states = np.where(ids != before, "fresh", np.where(given, "given", "written"))
    states = np.where(ids == result.mask_id, "masked", states)
    text = Text()
    for piece, state in pieces(ids.tolist(), states.tolist(), decode):
      text.append(piece.translate(PICTURES), STYLES[state])
    yield text


def pieces(ids: Sequence[int], states: Sequence[str], decode: Decode) -> Iterator[tuple[str, str]]:
  """(text, state) of neighbouring tokens of equal state, in order.

  A stretch between masks is split by state only if that leaves its text unchanged; where a
  character is made of tokens of several states, the whole stretch takes the state of its last one.
  """
  for stretch in runs([state == "masked" for state in states]):
    if states[stretch.start] == "masked":
      yield MASK_GLYPH * (stretch.stop - stretch.start), "masked"
      continue
    part = [slice(stretch.start + s.start, stretch.start + s.stop) for s in runs(states[stretch])]
    whole, texts = decode(list(ids[stretch])), [decode(list(ids[p])) for p in part]
    if "".join(texts) == whole:
      yield from ((text, states[p.start]) for text, p in zip(texts, part, strict=True))
    else:
      yield whole, states[stretch.stop - 1]


def runs(values: Sequence) -> list[slice]:
  """Maximal stretches of equal values."""
  cuts = [i for i in range(1, len(values)) if values[i] != values[i - 1]]
  edges = [0, *cuts, len(values)] if len(values) else []
  return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def pick(items: np.ndarray, count: int | None) -> np.ndarray:
  """`count` evenly spaced items, the first and the last among them; all if there are fewer."""
  if count is None or len(items) <= count:
    return items
  return items[np.linspace(0, len(items) - 1, max(count, 1)).round().astype(int)]
