"""A model under a name: what a request means for it, in ids and a sampler."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time

from lladax.config import ConfigError, override
from lladax.infer import BlockCausal, SamplerConfig, engine
from lladax.infer.generate import check_network
from lladax.model import Model
from lladax.serve.answers import Answer
from lladax.serve.protocol import Ask, Limits, RequestError
from lladax.serve.scheduler import Job, Scheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """A model under a name.

  Attributes:
    model: with a tokenizer.
    name: what requests call it.
    length: of an engine's canvas: prompt and answer in whole blocks.
    open_sampler: whether requests may set any field of the sampler. Every new combination is
      compiled, which takes the engine's thread seconds to minutes.
    created: seconds since 1970.
  """

  model: Model
  name: str
  length: int
  open_sampler: bool = False
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def check(self):
    """Raises ValueError for a model that cannot be served so, or a length that it cannot have."""
    model, block = self.model, self.model.sampler.block_length
    if model.tokenizer is None:
      raise ValueError("this model has no tokenizer: there is no text to serve")
    if model.config.mask_token_id is None:
      raise ValueError("this model has no mask token, so there is nothing to unmask")
    context = model.config.max_position_embeddings
    if not block < self.length <= context:
      raise ValueError(
        f"length lies between one block of {block} tokens and the model's context of {context}; "
        f"got {self.length}"
      )
    check_network(model.denoiser(model.sampler), model.sampler)

  @property
  def eos_ids(self) -> tuple[int, ...]:
    return (self.model.config.eos_token_id, *self.model.stop_ids)

  def about(self) -> dict:
    """The model as OpenAI lists it, and what a client may want to know besides."""
    return {
      "id": self.name,
      "object": "model",
      "created": self.created,
      "owned_by": "lladax",
      "context_length": self.length,
      "chat": self.model.conversation is not None,
      "sampler": repr(self.model.sampler),
    }

  def config(self, ask: Ask) -> SamplerConfig:
    """How a request is decoded. Those of equal `program` share an engine.

    Raises:
      RequestError: for fields of the sampler that it may not set, or that make no sense.
    """
    if ask.sampler and not self.open_sampler:
      raise RequestError(
        "sampler: this server decides how it decodes; start it with --open_sampler to let requests",
        param="sampler",
        code="unsupported",
      )
    try:
      config = override(self.model.sampler, ask.sampler)
      changes = {"temperature": ask.temperature, "top_p": ask.top_p}
      changes = {name: value for name, value in changes.items() if value is not None}
      # An answer ends at its end of text, whatever would follow.
      return dataclasses.replace(config, early_stop=True, **changes)
    except (ConfigError, ValueError) as error:
      raise RequestError(f"sampler: {error}", param="sampler", code="invalid_value") from None

  def rows(self, ask: Ask, config: SamplerConfig) -> list[tuple[list[int], list[int] | None]]:
    """Ids of each prompt, and of what follows the answer if anything does.

    Raises:
      RequestError: for text or ids that the model cannot read.
    """
    model, param = self.model, "messages" if ask.messages else "prompt"
    encode = model.tokenizer.encode
    try:
      if ask.messages:
        rows = [model.chat_prompt(ask.messages)]
      else:
        rows = [encode(p) if isinstance(p, str) else list(p) for p in ask.prompts]
      suffix = None if ask.suffix is None else encode(ask.suffix)
    except ValueError as error:
      raise RequestError(str(error), param=param, code="invalid_value") from None
    if suffix is not None and isinstance(config.cache, BlockCausal):
      raise RequestError(
        "suffix: this model writes block after block and does not see what follows a gap",
        param="suffix",
        code="unsupported",
      )
    self._check_ids(param, *rows)
    self._check_ids("suffix", suffix or [])
    return [(row, suffix) for row in rows]

  def _check_ids(self, param: str, *rows: list[int]):
    vocabulary, mask = self.model.config.vocab_size, self.model.config.mask_token_id
    bad = next((i for row in rows for i in row if not 0 <= i < vocabulary or i == mask), None)
    if bad is not None:
      raise RequestError(
        f"{param}: id {bad} is MASK or outside the vocabulary of {vocabulary}; for text to be "
        "filled in between use suffix",
        param=param,
        code="invalid_value",
      )

  def room(self, config: SamplerConfig, given: int, *, infill: bool = False) -> int:
    """Most tokens that can be written beside so many given ones, in whole blocks."""
    block = config.block_length
    if infill or config.align_blocks:  # blocks are counted from the start of the row
      return max(self.length // block * block - given, 0)
    return max((self.length - given) // block * block, 0)

  def requests(
    self, ask: Ask, config: SamplerConfig, limits: Limits
  ) -> list[tuple[engine.Request, Answer, int]]:
    """For each answer: what the engine gets, where the answer is collected, the prompt's length.

    Raises:
      RequestError: for prompts that do not fit.
    """
    block, mask = config.block_length, self.model.config.mask_token_id
    seed = secrets.randbits(31) if ask.seed is None else ask.seed
    made, drawing = [], config.drawing
    for number, (row, suffix) in enumerate(self.rows(ask, config)):
      infill = suffix is not None
      given = len(row) + len(suffix or ())
      room = self.room(config, given, infill=infill)
      # Who does not say how much gets what the sampler says, as far as there is room.
      length = ask.max_tokens or min(config.gen_length, limits.max_tokens, max(room, 1))
      if length > room:
        raise RequestError(
          f"this model's context is {self.length} tokens; the prompt has {given} and max_tokens is "
          f"{length} (in whole blocks of {block}): at most {room} fit beside it",
          param="messages" if ask.messages else "prompt",
          code="context_length_exceeded",
        )
      whole = min(-(-length // block) * block, room)  # what is more than asked for is cut
      for copy in range(ask.n):
        row_seed = (seed + number * ask.n + copy) % (1 << 31)
        if infill:
          ids = [*row, *[mask] * length, *suffix]
          request = engine.Request(ids=ids, seed=row_seed, infill=True, **drawing)
        else:
          request = engine.Request(ids=row, gen_length=whole, seed=row_seed, **drawing)
        answer = Answer(
          self.model.decode,
          first=len(row) if infill else 0,
          length=length,
          eos_ids=self.eos_ids,
          stop=ask.stop,
        )
        made.append((request, answer, given))
    return made

  async def warm_up(self, scheduler: Scheduler):
    """Decodes an answer as most requests will be answered, so that its blocks are compiled.

    Raises:
      Exception: whatever decoding raises.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    failures: list[Exception] = []

    def listen(event):
      failures.extend([event] if isinstance(event, Exception) else [])
      if failures or event.done:
        loop.call_soon_threadsafe(done.set)

    config = self.config(Ask())
    length = min(config.gen_length, self.room(config, 1))
    request = engine.Request(ids=[self.eos_ids[0]], gen_length=length)
    scheduler.submit([Job(config=config.program, request=request, listen=listen)])
    await done.wait()
    if failures:
      raise failures[0]
