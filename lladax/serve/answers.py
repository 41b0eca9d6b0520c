"""An answer as its blocks come in: its text, where it ends and why, and what the frames need."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from lladax.infer.earlier import earlier_texts
from lladax.infer.engine import Update
from lladax.infer.text_stream import AnswerStream, Decode, TextStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
  """What a block adds to an answer.

  Attributes:
    text: settled by it.
    frames: when the block's tokens were written, see `Answer.frames`.
    finish_reason: "stop" for an end of text or a stop string, "length" for all tokens written; None
      while the answer goes on.
  """

  text: str
  frames: dict
  finish_reason: str | None


class Answer:
  """One answer.

  Attributes:
    text: so far.
    nfe: network passes so far.
    finish_reason: as in `Delta`.
    frames: of all blocks so far as one: "first" (the block's first token, counted from the answer's
      start), "tokens", "texts" (put together, the text with its stop string), "revealed_at" (the
      iteration of the row that wrote it), "confidence", "nfe"; and "earlier", what tokens read before
      they gave way to others, by iteration: each with its "place" among these tokens, its "text"
      (null: masked again), "at" (the iteration) and "confidence".
  """

  def __init__(
    self,
    decode: Decode,
    *,
    first: int,
    length: int,
    eos_ids: Collection[int],
    stop: Sequence[str] = (),
  ):
    """`first` is the answer's first column as `Update.first` counts, `length` its most tokens."""
    self.text, self.nfe = "", 0
    self.finish_reason: str | None = None
    self.frames = _no_frames(0)
    self._first, self._length, self._seen = first, length, 0
    self._decode = decode
    self._answer = AnswerStream(decode, eos_ids=eos_ids, stop=stop)
    self._pieces = TextStream(decode)

  @property
  def tokens(self) -> int:
    return len(self._answer.ids)

  def take(self, update: Update) -> Delta:
    """Reads the next block.

    Raises:
      ValueError: for one that leaves a gap after the last.
    """
    if self.finish_reason is not None:
      return Delta(text="", frames=_no_frames(self.tokens), finish_reason=self.finish_reason)
    self.nfe = update.nfe
    skip = self._first + self._seen - update.first
    if skip < 0:
      raise ValueError(
        f"a block of request {update.ticket} begins at {update.first}, {-skip} columns late"
      )
    block = slice(skip, self._first + self._length - update.first)
    ids, known = update.tokens[block], self.tokens
    text = self._answer.push(ids)
    self._seen += len(ids)
    full = update.done or self._seen >= self._length
    if full:
      text += self._answer.finish()
    if full or self._answer.stopped:
      self.finish_reason = "stop" if self._answer.stopped else "length"
    frames = self._frames_of(update, block, known)
    self.text += text
    return Delta(text=text, frames=frames, finish_reason=self.finish_reason)

  def _frames_of(self, update: Update, block: slice, known: int) -> dict:
    ids = self._answer.ids[known:]
    texts = [self._pieces.push([i]) for i in ids]
    if self.finish_reason and texts:
      texts[-1] += self._pieces.finish()
    new = {
      "first": known,
      "tokens": ids,
      "texts": texts,
      "revealed_at": update.revealed_at[block][: len(ids)],
      "confidence": [round(c, 4) for c in update.confidence[block][: len(ids)]],
      "earlier": [
        one.to_tree()
        for one in earlier_texts(update.earlier, self._decode, skip=block.start, count=len(ids))
      ],
      "nfe": update.nfe,
    }
    for name in ("tokens", "texts", "revealed_at", "confidence"):
      self.frames[name] += new[name]
    self.frames["earlier"] += [{**one, "place": one["place"] + known} for one in new["earlier"]]
    self.frames["nfe"] = update.nfe
    return new


def _no_frames(first: int) -> dict:
  empty = {name: [] for name in ("tokens", "texts", "revealed_at", "confidence", "earlier")}
  return {"first": first, **empty, "nfe": 0}
