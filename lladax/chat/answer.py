"""An answer as its blocks come in, on the screen and as a replay."""

from __future__ import annotations

import dataclasses

from rich.console import Group
from rich.text import Text

from lladax.infer.earlier import EarlierText, earlier_texts, shown
from lladax.infer.engine import Update
from lladax.infer.replay import Replay
from lladax.infer.text_stream import AnswerStream, Decode, TextStream
from lladax.infer.view import crystallising

NEVER = 1 << 30  # the iteration that writes a token nobody has seen yet


@dataclasses.dataclass
class Answer:
  """An answer as it comes: what is known of each token, and what it took.

  Attributes:
    decode: ids to text.
    eos_ids: those that end it.
    length: tokens that there will be at most.
    ids: up to the end of the text.
    texts: what each reads.
    revealed_at, confidence: of each.
    earlier: what they read before, where the sampler edits what it has written.
    text: theirs, as far as it is settled.
    nfe: passes of the network so far.
    seconds: of decoding.
    over: whether that was all.
  """

  decode: Decode
  eos_ids: tuple[int, ...]
  length: int
  ids: list[int] = dataclasses.field(default_factory=list)
  texts: list[str] = dataclasses.field(default_factory=list)
  revealed_at: list[int] = dataclasses.field(default_factory=list)
  confidence: list[float] = dataclasses.field(default_factory=list)
  earlier: list[EarlierText] = dataclasses.field(default_factory=list)
  text: str = ""
  nfe: int = 0
  seconds: float = 0.0
  over: bool = False

  def __post_init__(self):
    self._stream = AnswerStream(self.decode, eos_ids=self.eos_ids)
    self._pieces = TextStream(self.decode)
    self._seen = 0

  def take(self, update: Update, seconds: float) -> str:
    """Reads the next block; the text that it settles."""
    skip = self._seen - update.first  # what comes before is of the prompt
    new = slice(skip, None)
    ids = update.tokens[new]
    text = self._stream.push(ids)
    self._seen += len(ids)
    self.over = update.done or self._stream.ended
    if self.over:
      text += self._stream.finish()
    known = len(self.ids)
    kept = len(self._stream.ids) - known
    for one in earlier_texts(update.earlier, self.decode, skip=skip, count=kept):
      self.earlier.append(dataclasses.replace(one, place=known + one.place))
    self.ids += ids[:kept]
    self.texts += [self._pieces.push([i]) for i in ids[:kept]]
    if self.over and self.texts:
      self.texts[-1] += self._pieces.finish()
    self.revealed_at += update.revealed_at[new][:kept]
    self.confidence += update.confidence[new][:kept]
    self.nfe, self.seconds, self.text = update.nfe, self.seconds + seconds, self.text + text
    return text

  @property
  def iterations(self) -> int:
    return max(self.revealed_at, default=-1) + 1

  def facts(self) -> str:
    """Tokens, tokens per forward pass and tokens per second."""
    tokens = len(self.ids)
    return (
      f"{tokens} tokens, {self.nfe} passes, {tokens / max(self.nfe, 1):.2f} tokens per pass, "
      f"{tokens / max(self.seconds, 1e-9):.1f} tokens/s"
    )

  def screen(self, number: int) -> Group:
    """What the terminal shows before iteration `number`."""
    left = 0 if self.over else self.length - len(self.ids)
    texts = [*self.texts, *[""] * left]
    revealed_at = [*self.revealed_at, *[NEVER] * left]
    confidence = [*self.confidence, *[0.0] * left]
    places = shown(texts, revealed_at, confidence, number, self.earlier)
    facts = f"{self.facts()}, {places.count(None)} masked"
    return Group(crystallising(places, number), Text(facts, style="dim"))

  def replay(self, prompt: str) -> Replay:
    return Replay(
      texts=self.texts,
      revealed_at=self.revealed_at,
      confidence=self.confidence,
      nfe=self.nfe,
      prompt=prompt,
      earlier=self.earlier,
    )
