"""Answers on their way from the engine's thread to a client: collected, or streamed as they grow."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence

from absl import logging
from fastapi import Request

from lladax.infer.engine import Update
from lladax.serve.answers import Answer, Delta
from lladax.serve.metrics import Metrics
from lladax.serve.protocol import Ask, RequestError
from lladax.serve.scheduler import Job, Listen, Refused, Stopping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
  """How completions and chat differ in their JSON.

  Attributes:
    model: its name.
    prefix: of ids.
    kind, chunk: the "object" of a whole answer and of a piece of one.
    whole, piece: the fields of a choice that hold an answer's text.
    opening: fields of a choice with which a stream of it begins; None: it begins with text.
  """

  model: str
  prefix: str
  kind: str
  chunk: str
  whole: Callable[[str], dict]
  piece: Callable[[str], dict]
  opening: dict | None = None


def completion_style(model: str) -> Style:
  def text(text: str) -> dict:
    return {"text": text, "logprobs": None}

  return Style(
    model=model, prefix="cmpl", kind="text_completion", chunk="text_completion", whole=text,
    piece=text,
  )  # fmt: skip


def chat_style(model: str) -> Style:
  return Style(
    model=model,
    prefix="chatcmpl",
    kind="chat.completion",
    chunk="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}, "logprobs": None},
    piece=lambda text: {"delta": {"content": text} if text else {}, "logprobs": None},
    opening={"delta": {"role": "assistant", "content": ""}, "logprobs": None},
  )


class Rows:
  """The answers to one request.

  Args:
    ask: what was asked for.
    loop: of the client's connection; blocks come from another thread.
    cancel: forgets jobs.
    metrics: counts what was sent.
  """

  def __init__(
    self,
    ask: Ask,
    loop: asyncio.AbstractEventLoop,
    cancel: Callable[[Sequence[Job]], None],
    metrics: Metrics,
  ):
    self._ask, self._loop, self._cancel, self._metrics = ask, loop, cancel, metrics
    self._jobs: list[Job] = []
    self._answers: list[Answer] = []
    self._prompt: list[int] = []
    self._arrived: asyncio.Queue[tuple[int, Update | Exception]] = asyncio.Queue()

  def add(self, job: Job, answer: Answer, prompt: int):
    self._jobs.append(job)
    self._answers.append(answer)
    self._prompt.append(prompt)

  def listener(self, index: int) -> Listen:
    """What the engine's thread calls with the blocks of answer `index`."""

    def listen(event: Update | Exception):
      with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, event))

    return listen

  async def whole(self, request: Request, style: Style) -> dict | None:
    """All answers in one object; None if the client has gone.

    Raises:
      RequestError: if one of them failed.
    """
    try:
      async for _ in self._deltas(request):
        pass
    except Exception as error:
      raise _refusal(error) from None
    if not self._finished:
      return None
    self._count()
    choices = [
      self._choice(i, style.whole(answer.text), answer.finish_reason, answer.frames)
      for i, answer in enumerate(self._answers)
    ]
    return {**self._head(style, style.kind), "choices": choices, "usage": self._usage()}

  async def stream(self, request: Request, style: Style) -> AsyncIterator[str]:
    """Server-sent events: each answer's pieces as they are settled, usage if asked for, [DONE]."""
    head = self._head(style, style.chunk)
    if self._ask.include_usage:
      head["usage"] = None

    def event(index: int, fields: dict, reason=None, frames=None) -> str:
      return _event({**head, "choices": [self._choice(index, fields, reason, frames)]})

    try:
      if style.opening is not None:
        for index in range(len(self._answers)):
          yield event(index, style.opening)
      async for index, delta in self._deltas(request):
        if delta.text or delta.finish_reason or self._ask.frames:
          yield event(index, style.piece(delta.text), delta.finish_reason, delta.frames)
    except Exception as error:  # the status has been sent already
      yield _event(_refusal(error).to_tree())
      return
    finally:
      self._cancel(self._unfinished())
    if not self._finished:
      return
    self._count()
    if self._ask.include_usage:
      yield _event({**head, "choices": [], "usage": self._usage()})
    yield "data: [DONE]\n\n"

  async def _deltas(self, request: Request) -> AsyncIterator[tuple[int, Delta]]:
    """Blocks as they come, until all answers have ended or the client has gone.

    Raises:
      Exception: whatever an answer failed with.
    """
    gone = arrives = asyncio.ensure_future(_until_gone(request))
    try:
      while not self._finished:
        arrives = asyncio.ensure_future(self._arrived.get())
        await asyncio.wait((gone, arrives), return_when=asyncio.FIRST_COMPLETED)
        if not arrives.done():
          return
        index, event = arrives.result()
        if isinstance(event, Exception):
          raise event
        answer = self._answers[index]
        if answer.finish_reason is None:
          delta = answer.take(event)
          if delta.finish_reason and not event.done:  # ended by a stop string: the rest is spared
            self._cancel([self._jobs[index]])
          yield index, delta
    finally:
      gone.cancel()
      arrives.cancel()
      self._cancel(self._unfinished())

  @property
  def _finished(self) -> bool:
    return all(answer.finish_reason for answer in self._answers)

  def _unfinished(self) -> list[Job]:
    pairs = zip(self._jobs, self._answers, strict=True)
    return [job for job, answer in pairs if answer.finish_reason is None]

  def _choice(self, index: int, fields: dict, reason: str | None, frames: dict | None) -> dict:
    choice = {"index": index, **fields, "finish_reason": reason}
    return {**choice, "denoising": frames} if self._ask.frames and frames else choice

  def _head(self, style: Style, kind: str) -> dict:
    return {
      "id": f"{style.prefix}-{secrets.token_hex(12)}",
      "object": kind,
      "created": int(time.time()),
      "model": style.model,
    }

  def _usage(self) -> dict:
    # One prompt is counted once, however many answers it gets.
    prompt = sum(self._prompt[:: self._ask.n])
    answer = sum(answer.tokens for answer in self._answers)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": answer,
      "total_tokens": prompt + answer,
      "forward_passes": sum(answer.nfe for answer in self._answers),
    }

  def _count(self):
    usage = self._usage()
    self._metrics.sent(
      prompt=usage["prompt_tokens"],
      answer=usage["completion_tokens"],
      passes=usage["forward_passes"],
    )


async def _until_gone(request: Request):
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _refusal(error: Exception) -> RequestError:
  if isinstance(error, Stopping):
    return RequestError(str(error), status=503, code="unavailable")
  if isinstance(error, Refused):
    return RequestError(str(error), code="invalid_value")
  logging.error("an answer failed: %r", error, exc_info=error)
  return RequestError("the server failed on this request", status=500, code="failed")


def _event(tree: dict) -> str:
  # ensure_ascii: no line separators of Unicode's that a client might split at.
  return f"data: {json.dumps(tree)}\n\n"
