"""Text of tokens that arrive a few at a time, and where it ends.

A token may be part of a character, and a stop string may be spread over tokens: what could still
change is held back, so that the pieces handed out, put together, are the text of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

Decode = Callable[[Sequence[int]], str]

UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character, or not yet
# A character has at most four bytes, so at most three of them can be waiting for the last.
WAITING = 3
# Tokens that are decoded again with those that follow: where a decoder drops a leading blank, it is
# that of the first of these.
CONTEXT = 4


class TextStream:
  """Decodes tokens as they come.

  The pieces put together are `decode` of all tokens, for every decoder under which a text only
  grows with its tokens, but for the character that is still incomplete.
  """

  def __init__(self, decode: Decode):
    self._decode = decode
    self._ids: list[int] = []
    self._shown = 0  # characters of decode(self._ids) that were handed out

  def push(self, ids: Sequence[int]) -> str:
    """What `ids` add to the text and later tokens cannot change."""
    self._ids += ids
    text = self._decode(self._ids)
    tail = text[-WAITING:]
    held = len(tail) - len(tail.rstrip(UNKNOWN))
    new = self._take(text, len(text) - held)
    if not held and len(self._ids) > 8 * CONTEXT:
      self._ids = self._ids[-CONTEXT:]
      self._shown = len(self._decode(self._ids))
    return new

  def finish(self) -> str:
    """What was held back, as it is."""
    text = self._decode(self._ids)
    return self._take(text, len(text))

  def _take(self, text: str, end: int) -> str:
    new = text[self._shown : end]
    self._shown = max(self._shown, end)
    return new


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
  """What each token adds to the text; a character of several tokens is in its last one."""
  stream = TextStream(decode)
  texts = [stream.push([i]) for i in ids]
  if texts:
    texts[-1] += stream.finish()
  return texts


class AnswerStream:
  """The text of an answer up to its end: an id that ends a text, or one of the stop strings.

  Attributes:
    ids: the tokens of the answer so far, without the one that ended it.
    stopped: whether an end was found.
    ended: whether it was, or `finish` was called; what is pushed afterwards is ignored.
  """

  def __init__(self, decode: Decode, *, eos_ids: Collection[int] = (), stop: Sequence[str] = ()):
    if not all(stop):
      raise ValueError("a stop string is empty: it would end every answer before it begins")
    self.ids: list[int] = []
    self.stopped = self.ended = False
    self._eos_ids = frozenset(eos_ids)
    self._stop = tuple(stop)
    self._stream = TextStream(decode)
    self._pending = ""  # decoded, and possibly the beginning of a stop string

  def push(self, ids: Sequence[int]) -> str:
    """The text that these tokens add, as far as it is settled."""
    settled = ""
    for i in ids:
      if self.ended:
        break
      if i in self._eos_ids:
        settled += self.finish()
        self.stopped = True
      else:
        self.ids.append(i)
        settled += self._settle(self._stream.push([i]))
    return settled

  def finish(self) -> str:
    """What was held back. Afterwards the answer has ended."""
    if self.ended:
      return ""
    settled = self._settle(self._stream.finish())
    if not self.ended:
      settled, self._pending = settled + self._pending, ""
    self.ended = True
    return settled

  def _settle(self, text: str) -> str:
    self._pending += text
    found = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
    if found:
      settled, self._pending = self._pending[: min(found)], ""
      self.stopped = self.ended = True
      return settled
    keep = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
    cut = len(self._pending) - keep
    settled, self._pending = self._pending[:cut], self._pending[cut:]
    return settled


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` with which `stop` begins, short of all of it."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
