"""A chat in the terminal: lines in, commands and answers out, the next block decoded meanwhile."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live

from lladax.chat.answer import Answer
from lladax.chat.conversation import Conversation
from lladax.config import ConfigError, fields_help, override
from lladax.infer import SamplerConfig
from lladax.infer.engine import Engine, Request, Update
from lladax.infer.replay import Replay, save_gif, save_html
from lladax.model import Model

# An engine's canvas is as long as the conversation, rounded up: few lengths are compiled.
LENGTH_MULTIPLE = 256
FRAMES_PER_SECOND = 30
# A block is shown for as long as it took to decode, so that the show keeps pace, but not longer.
LONGEST_BLOCK_SECONDS = 1.0

HELP = """\
/set NAME=VALUE  a field of the sampler, e.g. /set temperature=0.7; /set alone shows them
/system TEXT     what the assistant is told before everything else
/save FILE       writes the conversation as JSON; /load FILE goes on with it
/reset           forgets the conversation
/quit            ends, and so does Ctrl-D; Ctrl-C stops an answer"""


class Session:
  """A conversation with a model.

  Args:
    model: with a tokenizer.
    sampler: how to decode; default the model's.
    seed: of the first answer; the others count on. Only read if something is drawn.
    console: where answers go; plain lines where it is no terminal.
    record: None, or the name of the replay's files without their endings.
  """

  def __init__(
    self,
    model: Model,
    *,
    sampler: SamplerConfig | None = None,
    seed: int = 0,
    console: Console | None = None,
    record: str | None = None,
  ):
    self.model, self.console = model, console or Console()
    self.sampler = dataclasses.replace(sampler or model.sampler, early_stop=True)
    self.conversation = Conversation(model)
    self.replays: list[Replay] = []
    self._seed, self._record = seed, record
    self._engines: dict[tuple[SamplerConfig, int], Engine] = {}

  def say(self, line: str):
    """Does what a line asks for: a command, or an answer.

    Raises:
      EOFError: for /quit.
      ValueError, ConfigError, OSError: with what was wrong, the conversation being as it was.
    """
    if not line.strip():
      return
    line.encode()  # a ValueError for bytes that are no text, which a terminal may hand on
    if line.startswith("/"):
      self.command(*line[1:].split(maxsplit=1))
    else:
      self.answer(line)

  def command(self, name: str = "", rest: str = ""):
    """A line that began with a slash."""
    conversation = self.conversation
    if name == "quit":
      raise EOFError
    if name == "reset":
      conversation.reset()
    elif name == "set" and rest:
      self.sampler = override(self.sampler, [rest])
    elif name == "set":
      self._print(fields_help(self.sampler))
    elif name == "system" and conversation.chats:
      conversation.system(rest)
    elif name in ("save", "load"):
      if not rest:
        raise ValueError(f"/{name} needs the name of a file")
      getattr(conversation, name)(rest)
      self._print(f"{name}d {rest}" if name == "save" else f"loaded {rest}")
    elif name == "help":
      self._print(HELP)
    else:
      raise ValueError(f"there is no command /{name} here; /help lists them")

  def answer(self, line: str) -> Answer:
    """Answers a line; it joins the conversation with what was written, even if it was stopped."""
    config, model = self.sampler, self.model
    context, block = model.config.max_position_embeddings, config.block_length
    room = context - config.gen_length - (block if config.align_blocks else 0)
    if room <= 0:
      raise ValueError(
        f"gen_length {config.gen_length} leaves no room in the context of {context}; "
        "/set gen_length=..."
      )
    ids = self.conversation.prompt(line, room)
    need = -(-(len(ids) + config.gen_length + block) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    request = Request(ids=ids, seed=self._seed + len(self.replays))
    eos_ids = (model.config.eos_token_id, *model.stop_ids)
    answer = Answer(model.decode, eos_ids, config.gen_length)
    blocks = self._blocks(request, min(need, context))
    try:
      (self._animate if self.console.is_terminal else self._stream)(answer, blocks)
    except KeyboardInterrupt:
      self._print("stopped")
    finally:
      blocks.close()
    if answer.ids:
      self.conversation.add(line, answer.text)
      self.replays.append(answer.replay(line))
    if self._record is not None and self.replays:
      self._save_record()
    return answer

  def _blocks(self, request: Request, length: int) -> Iterator[tuple[Update, float] | None]:
    """Blocks as a thread decodes them, with the seconds they took; None while there is none."""
    blocks: queue.Queue = queue.Queue()
    stop = threading.Event()

    def decode():
      try:
        with self.model.on_mesh():
          engine = self._engine(length)
          ticket = engine.add(request)
          done = False
          while not done and not stop.is_set():
            begin = time.perf_counter()
            (update,) = engine.step()
            done = update.done
            blocks.put((update, time.perf_counter() - begin))
          engine.cancel(ticket)
      except Exception as error:
        self._engines.clear()  # what state it is in, nobody knows
        blocks.put(error)

    thread = threading.Thread(target=decode, name="decode", daemon=True)
    thread.start()
    try:
      done = False
      while not done:
        try:
          block = blocks.get(timeout=1 / FRAMES_PER_SECOND)
        except queue.Empty:
          yield None
          continue
        if isinstance(block, Exception):
          raise block
        done = block[0].done
        yield block
    finally:
      stop.set()
      thread.join()

  def _engine(self, length: int) -> Engine:
    key = (self.sampler, length)
    if key not in self._engines:
      self._engines.clear()  # one canvas at a time; what was compiled stays
      self._engines[key] = self.model.engine(sampler=self.sampler, slots=1, length=length)
    return self._engines[key]

  def _animate(self, answer: Answer, blocks: Iterator):
    """Plays the blocks, each while the next one is decoded, then leaves the text."""
    number = 0
    try:
      with Live(console=self.console, auto_refresh=False, transient=True) as live:
        live.update(answer.screen(0), refresh=True)
        for block in blocks:
          if block is None:
            continue
          update, seconds = block
          answer.take(update, seconds)
          frames = range(number + 1, answer.iterations + 1)
          pause = min(seconds, LONGEST_BLOCK_SECONDS) / max(len(frames), 1)
          # More frames than the eye sees are left out.
          stride = max(1, round(1 / FRAMES_PER_SECOND / max(pause, 1e-6)))
          for frame in [*frames[stride - 1 : -1 : stride], *frames[-1:]]:
            live.update(answer.screen(frame), refresh=True)
            time.sleep(min(pause * stride, 0.25))
          number = answer.iterations
    finally:
      if answer.ids:
        self.console.print(answer.screen(number).renderables[0])
        self._print(answer.facts())

  def _stream(self, answer: Answer, blocks: Iterator):
    """Prints the text as it is settled."""
    try:
      for block in filter(None, blocks):
        print(answer.take(*block), end="", file=self.console.file, flush=True)
    finally:
      print(file=self.console.file)
    self._print(answer.facts())

  def _save_record(self):
    save_html(f"{self._record}.html", self.replays, title="Denoising")
    try:
      save_gif(f"{self._record}.gif", self.replays)
    except ImportError as error:
      self._print(str(error))

  def _print(self, text: str):
    style = "dim" if self.console.is_terminal else ""
    self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def talk(session: Session, read: Callable[[], str]):
  """Lines until there are no more; what is wrong with one is said, and the next is read."""
  while True:
    try:
      session.say(read())
    except (EOFError, KeyboardInterrupt):
      return
    except (ConfigError, ValueError, OSError, RuntimeError) as error:  # JAX's are RuntimeErrors
      style = "red" if session.console.is_terminal else ""
      session.console.print(
        f"error: {error}", style=style, markup=False, highlight=False, soft_wrap=True
      )
