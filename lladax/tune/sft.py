"""Supervised fine-tuning on conversations: prompts stay clean, one answer of each is noised.

As LLaDA does it (arXiv 2502.09992, section 2.3 and appendix B.1; LLaDA-MoE, arXiv 2509.24389): of a
conversation with several answers one is drawn, what comes later is cut; end-of-text tokens that fill
a row up to the longest of the batch belong to the answer. The loss of each answer is divided by its
length: `Objective(normalize=ResponseLength())`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np
from absl import logging

from lladax.data import BatchesConfig, Data, Tokenizer, make_tokenizer
from lladax.data.conversations import Conversation, read_conversations
from lladax.data.mixture import Draws, Mixture, Part, order_seed
from lladax.data.transforms import check_ids
from lladax.hub import BUILT_IN, Chat, ChatTemplate, chat_tokenizer, read_chat_template
from lladax.tune.packing import Packing
from lladax.tune.turns import Turns, encode_turns
from lladax.types import Batch

EosPadding = Literal["batch", "length", "none"]
TooLong = Literal["error", "drop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationConfig(BatchesConfig):
  """Conversations, how they become rows, and what of a row is learned.

  Attributes:
    conversations: JSON lines as `lladax.data.conversations` describes them: files, patterns, folders.
    heldout_conversations: the same, held out. None: `heldout` of the others.
    heldout: the fraction of the conversations that is held out where no files are named for it; by
      a hash of their messages, so that equal ones are on one side.
    split_seed: chooses them.
    tokenizer: `bytes` or the path of a tokenizer; None: that of what the run starts from.
    template: "llada_moe", "llada", "chatml", "plain", or a released model's folder. Special tokens
      of a template by name that the tokenizer lacks are appended to it; the model needs ids for
      them. "plain" needs none.
    eos_padding: what follows an answer that is shorter than its row. "batch": end-of-text tokens up
      to the longest row of the global batch, which belong to the answer: they are noised, learned
      and counted in its length (LLaDA). "length": the same up to L. "none": nothing. The network
      sees what belongs to the answer, and nothing after it.
    eos_tail: so many end-of-text tokens at most, U{0..eos_tail}, follow each answer as part of it.
      What `eos_padding` does, for packed rows: without any, the number of MASKs betrays the length
      of the answer, and a sampler's canvas is longer than that.
    packing: several conversations in a row, best fit, each a segment that attends to itself alone.
      Needs eos_padding="none".
    too_long: whether prompt and answer of more than L tokens are an "error", or "drop" that turn.

  Raises:
    ValueError: for a value outside its range, or values that do not fit each other.
  """

  conversations: str | tuple[str, ...]
  heldout_conversations: str | tuple[str, ...] | None = None
  heldout: float = 0.02
  split_seed: int = 0
  tokenizer: str | None = None
  template: str = "llada_moe"
  eos_padding: EosPadding = "batch"
  eos_tail: int = 0
  packing: bool = False
  too_long: TooLong = "error"

  def __post_init__(self):
    super().__post_init__()
    for name, words in (("eos_padding", get_args(EosPadding)), ("too_long", get_args(TooLong))):
      if getattr(self, name) not in words:
        raise ValueError(f"{name} is one of {', '.join(words)}; got {getattr(self, name)!r}")
    for name in ("eos_tail", "split_seed"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} is not negative, got {getattr(self, name)}")
    if not 0 <= self.heldout < 1:
      raise ValueError(f"heldout is a fraction of at least 0 and below 1, got {self.heldout}")
    if self.packing and self.eos_padding != "none":
      raise ValueError(
        f"packing leaves no row to pad with eos_padding={self.eos_padding!r}; set it to 'none', and "
        "eos_tail to about the length of a block of the sampler"
      )

  def load(
    self, *, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
  ) -> ConversationData:
    """Reads and encodes the conversations.

    Raises:
      ValueError: for a line that is no conversation (`ConversationError`, with file and line), a
        template that does not fit the tokenizer, a vocabulary below the ids.
      FileNotFoundError: for a path that matches nothing.
    """
    if tokenizer is None:
      if self.tokenizer is None:
        raise ValueError(
          "no tokenizer: start from a run or a released model, or name one with data.tokenizer"
        )
      tokenizer = make_tokenizer(self.tokenizer)
    tokenizer = chat_tokenizer(tokenizer, _template(self.template), vocab_size=vocab_size)
    if vocab_size is not None:
      check_ids(np.array([tokenizer.vocab_size - 1]), vocab_size)
    chat = Chat(tokenizer, tokenizer.template)
    encode = functools.partial(
      encode_turns, chat=chat, length=self.length, drop=self.too_long == "drop"
    )
    if self.heldout_conversations is not None:
      train, heldout = read_conversations(self.conversations), self.heldout_conversations
      heldout = read_conversations(heldout)
    else:
      train, heldout = (
        _side(read_conversations(self.conversations), self.heldout, self.split_seed, held)
        for held in (False, True)
      )
    train, dropped = encode(train, tail=self.eos_tail)
    heldout, heldout_dropped = encode(heldout)
    if not len(train):
      raise ValueError(
        f"no conversation to train on in {self.conversations!r}: {dropped} turns were longer than "
        f"data.length {self.length}, and a fraction of {self.heldout} is held out"
      )
    if dropped or heldout_dropped:
      logging.warning(
        "%d turns of %d are longer than data.length %d and were dropped, %d of %d held out",
        dropped, dropped + len(train), self.length, heldout_dropped,
        heldout_dropped + len(heldout),
      )  # fmt: skip
    data = ConversationData(
      config=self, tokenizer=tokenizer, train=train, heldout=heldout, dropped=dropped
    )
    logging.info(
      "%d conversations (%d answers of %d tokens) to train on, %d held out",
      train.num_conversations, len(train), train.answer.sum(), heldout.num_conversations,
    )  # fmt: skip
    return data


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ConversationData(Data):
  """Encoded conversations, as batches.

  A draw is a conversation and, where it has several answers, one of them; in packed rows a draw is a
  row. Every conversation comes once in an epoch.

  Attributes:
    tokenizer: with the chat template and its special tokens; a checkpoint has it whole.
    train, heldout: the answers.
    dropped: turns left out of `train` because they are too long.
  """

  config: ConversationConfig
  train: Turns
  heldout: Turns
  dropped: int

  @functools.cached_property
  def _packing(self) -> Packing:
    config = self.config
    seed = order_seed(config.seed)
    return Packing(self.train, length=config.length, seed=seed, tail=config.eos_tail)

  @functools.cached_property
  def mixture(self) -> Mixture:
    config, turns = self.config, self.train
    content = hashlib.sha256()
    for part in (turns.tokens, turns.prompt, turns.answer, turns.first):
      content.update(np.ascontiguousarray(part).tobytes())
    size = turns.num_conversations
    if config.packing:
      content.update(f"packed {config.length} {config.eos_tail}".encode())
      size = self._packing.end(0)
    names = config.conversations
    return Mixture([
      Part(
        name="+".join(pathlib.PurePath(n).name for n in ([names] if isinstance(names, str) else names)),
        key=content.hexdigest()[:16],
        size=size,
        order_seed=order_seed(config.seed),
      )
    ])  # fmt: skip

  def train_batch(self, draws: Draws, rows: np.ndarray) -> Batch:
    if self.config.packing:
      return self._packed_batch(draws.position[rows])
    turn, tail = self._drawn_turns(draws)
    ends = self.train.lengths[turn] + tail
    if self.config.eos_padding == "batch":
      ends = np.full_like(ends, ends.max())  # of the whole batch, whatever rows are asked for
    elif self.config.eos_padding == "length":
      ends = np.full_like(ends, self.config.length)
    pieces = [[(turn[row], int(ends[row]))] for row in rows]
    return self._batch(self.train, pieces)

  @property
  def num_heldout(self) -> int:
    return len(self.heldout)

  def heldout_batch(self, index: np.ndarray) -> Batch:
    """Every held-out answer to its end, whatever pads those of training."""
    ends = self.heldout.lengths
    return self._batch(self.heldout, [[(i, int(ends[i]))] if i >= 0 else [] for i in index])

  def fingerprint(self) -> dict[str, Any]:
    def crc(turns: Turns) -> int:
      value = 0
      for part in (turns.tokens, turns.start, turns.prompt, turns.answer, turns.first):
        value = zlib.crc32(np.ascontiguousarray(part).tobytes(), value)
      return value

    return {
      "conversations": self.train.num_conversations,
      "answers": len(self.train),
      "heldout_answers": len(self.heldout),
      "crc32": crc(self.train),
      "heldout_crc32": crc(self.heldout),
    }

  def epochs(self, step: int, start: dict[str, int] | None = None) -> dict[str, float]:
    if not self.config.packing:
      return super().epochs(step, start)
    (part,) = self.mixture.parts
    position = (start or {}).get(part.key, 0) + step * self.config.batch_size
    epoch, row = self._packing.locate(position)
    return {part.name: epoch + row / len(self._packing.epoch(epoch))}

  def _drawn_turns(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """The turn of each draw and the tail after it, int64[B] both."""
    words = [self.config.seed, 0x5F7]
    random = [
      np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, int(position)])))
      for position in draws.position
    ]
    turn = self.train.choose(self.mixture.rows(draws), np.array([r.random() for r in random]))
    most = self.config.eos_tail
    tail = [int(r.integers(0, most, endpoint=True)) if most else 0 for r in random]
    return turn, np.array(tail, np.int64)

  def _packed_batch(self, positions: np.ndarray) -> Batch:
    rows = []
    for position in positions.tolist():
      number, index = self._packing.locate(position)
      epoch = self._packing.epoch(number)
      chosen = [(epoch.turn[c], epoch.tail[c]) for c in epoch.rows[index]]
      rows.append([(turn, int(self.train.lengths[turn] + tail)) for turn, tail in chosen])
    return self._batch(self.train, rows)

  def _batch(self, turns: Turns, rows: list[list[tuple[int, int]]]) -> Batch:
    """Rows of pieces (turn, its length with the end-of-text tokens after it)."""
    shape = len(rows), self.config.length
    tokens = np.full(shape, self.tokenizer.pad_id, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    maskable = np.zeros(shape, bool)
    for row, pieces in enumerate(rows):
      at = 0
      for segment, (turn, length) in enumerate(pieces, 1):
        ids, end = turns.ids(turn), at + length
        tokens[row, at : at + len(ids)] = ids
        tokens[row, at + len(ids) : end] = self.tokenizer.eos_id
        segment_ids[row, at:end] = segment
        positions[row, at:end] = np.arange(length)
        maskable[row, at + turns.prompt[turn] : end] = True
        at = end
    return Batch(tokens=tokens, segment_ids=segment_ids, positions=positions, maskable=maskable)


def _template(name: str) -> ChatTemplate:
  """A built-in template, or that of a folder.

  Raises:
    ValueError: for an unknown name, or a folder without one.
  """
  if name in BUILT_IN:
    return BUILT_IN[name]
  folder = pathlib.Path(name)
  known = ", ".join(BUILT_IN)
  if not folder.is_dir():
    raise ValueError(f"template {name!r}: neither one of {known}, nor a folder")
  template = read_chat_template(folder, default=next(iter(BUILT_IN)))
  if template.name in BUILT_IN:
    raise ValueError(f"{name} has no chat template; name one of {known}")
  return template


def _side(
  conversations: Iterable[Conversation], heldout: float, seed: int, held: bool
) -> Iterator[Conversation]:
  """Those held out, or the others."""
  key = str(seed).encode()
  for conversation in conversations:
    text = json.dumps([[message.role, message.content] for message in conversation.messages])
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    if (int.from_bytes(digest, "little") < heldout * 2**64) == held:
      yield conversation
