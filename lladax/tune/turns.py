"""Answers to learn, encoded: each with the prompt it answers, in one flat array."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable

import numpy as np

from lladax.data.conversations import Conversation, ConversationError
from lladax.hub import Chat


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
  """The answers of conversations: W of them in C conversations.

  Attributes:
    tokens: int32[total]. An answer follows its prompt. Prompts that begin alike share their tokens
      where the turns are of one conversation.
    start: int64[W], where a prompt begins.
    prompt: int64[W], its tokens.
    answer: int64[W], tokens of the answer with the end of the turn.
    first: int64[C + 1]; the turns of conversation c are first[c] to first[c + 1].
  """

  tokens: np.ndarray
  start: np.ndarray
  prompt: np.ndarray
  answer: np.ndarray
  first: np.ndarray

  def __len__(self) -> int:
    """Turns."""
    return len(self.start)

  @property
  def num_conversations(self) -> int:
    return len(self.first) - 1

  @property
  def lengths(self) -> np.ndarray:
    """int64[W], tokens of prompt and answer."""
    return self.prompt + self.answer

  def ids(self, turn: int) -> np.ndarray:
    """int32[prompt + answer]."""
    start = self.start[turn]
    return self.tokens[start : start + self.prompt[turn] + self.answer[turn]]

  def choose(self, conversations: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One turn of each of some conversations: int64, by numbers of [0, 1)."""
    first = self.first[conversations]
    count = self.first[conversations + 1] - first
    return first + np.minimum((u * count).astype(np.int64), count - 1)


def encode_turns(
  conversations: Iterable[Conversation], chat: Chat, *, length: int, drop: bool, tail: int = 0
) -> tuple[Turns, int]:
  """Encodes every answer with its prompt.

  Args:
    conversations: read once, one at a time.
    chat: tokenizer and template.
    length: the most tokens that prompt and answer may have together.
    drop: leave out turns that are longer, instead of an error; a conversation without any turn left
      goes too.
    tail: tokens that an answer needs besides.

  Returns:
    (turns, number of turns that were dropped).

  Raises:
    ConversationError: naming file and line, for a turn that is too long or that the template
      refuses.
  """
  tokens, start, prompts, answers, first = [], [], [], [], [0]
  total = dropped = 0
  for conversation in _with_progress(conversations):
    turns = list(_encode(conversation, chat))
    fitting = [turn for turn in turns if len(turn[0]) + len(turn[1]) + tail <= length]
    if len(fitting) < len(turns) and not drop:
      longest = max(len(prompt) + len(answer) for prompt, answer in turns)
      more = f" and up to {tail} of end of text" if tail else ""
      raise ConversationError(
        f"{conversation.where}: prompt and answer have {longest} tokens{more}, and a row has "
        f"{length}; raise data.length, or set data.too_long='drop'"
      )
    dropped += len(turns) - len(fitting)
    if not fitting:
      continue
    # The longest is the last; earlier ones are mostly its beginning.
    whole = np.array(fitting[-1][0] + fitting[-1][1], np.int32)
    block, size = [whole], len(whole)
    for prompt, answer in fitting:
      ids = np.array(prompt + answer, np.int32)
      if np.array_equal(whole[: len(ids)], ids):
        start.append(total)
      else:
        start.append(total + size)
        block.append(ids)
        size += len(ids)
      prompts.append(len(prompt))
      answers.append(len(answer))
    tokens += block
    total += size
    first.append(len(start))
  flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
  return Turns(
    flat, *(np.array(list_, np.int64) for list_ in (start, prompts, answers, first))
  ), dropped


def _encode(conversation: Conversation, chat: Chat):
  messages = [message.as_dict() for message in conversation.messages]
  for index in conversation.answers:
    try:
      yield chat.encode_turn(messages[: index + 1])
    except ValueError as error:
      raise ConversationError(f"{conversation.where}: {error}") from None


def _with_progress(conversations: Iterable[Conversation]):
  """The same, with a count on a terminal once it takes longer than a second."""
  started, status = time.monotonic(), None
  try:
    for count, conversation in enumerate(conversations):
      if count % 100 == 0 and sys.stderr.isatty() and time.monotonic() - started > 1:
        if status is None:
          from rich.console import Console

          status = Console(stderr=True).status("")
          status.start()
        status.update(f"encoding conversations: {count}")
      yield conversation
  finally:
    if status is not None:
      status.stop()
