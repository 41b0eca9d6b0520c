"""The chat: lines in, answers out, everything kept, nothing lost when it is stopped."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console
from small_models import small_model

from lladax.chat import Answer, Conversation, Session, talk
from lladax.data import Bytes, train_bpe
from lladax.hub import BUILT_IN, Chat
from lladax.infer import SamplerConfig
from lladax.infer.earlier import Earlier
from lladax.infer.engine import Engine, Update
from lladax.infer.view import MASK_GLYPH, PICTURES

SAMPLER = SamplerConfig(gen_length=16, steps=8, block_length=8, temperature=0.9)


@pytest.fixture(scope="module")
def chat_model():
  tokenizer = train_bpe(["User:\nto be\n\nAssistant:\nor not to be"], 280)
  conversation = Chat(tokenizer, BUILT_IN["plain"])
  return small_model(tokenizer, context=128, sampler=SAMPLER, conversation=conversation)


@pytest.fixture(scope="module")
def text_model(chat_model):
  """The same without a template, so that nothing is compiled again."""
  return dataclasses.replace(chat_model, conversation=None)


def session_of(model, *, terminal=False, **options):
  out = io.StringIO()
  console = Console(file=out, force_terminal=terminal, width=100, color_system="truecolor")
  return Session(model, console=console, **options), out


def script(*lines):
  waiting = list(lines)

  def read():
    if not waiting:
      raise EOFError
    return waiting.pop(0)

  return read


def test_every_line_is_asked_with_the_conversation_so_far(chat_model, monkeypatch):
  session, out = session_of(chat_model, seed=4)
  asked, prompt = [], Conversation.prompt

  def noted(*args):
    asked.append(prompt(*args))
    return asked[-1]

  monkeypatch.setattr(Conversation, "prompt", noted)
  talk(session, script("to be", "", "or not", "/quit", "never read"))
  messages = session.conversation.messages
  assert [m["role"] for m in messages] == ["user", "assistant"] * 2
  assert [m["content"] for m in messages[::2]] == ["to be", "or not"]
  assert asked == [chat_model.chat_prompt(messages[:1]), chat_model.chat_prompt(messages[:3])]
  shown = out.getvalue()
  assert shown.index(messages[1]["content"]) < shown.index(messages[3]["content"])
  facts = re.findall(r"\d+ tokens, (\d+) passes, [\d.]+ tokens per pass, [\d.]+ tokens/s", shown)
  assert len(facts) == 2 and all(1 <= int(passes) <= 8 for passes in facts)


def test_a_model_without_a_template_continues_the_text(text_model):
  session, _ = session_of(text_model)
  talk(session, script("to be", "or"))
  first = text_model.generate("to be", seed=0)
  assert session.conversation.text.startswith(f"to be{first}\nor")
  # A text that outgrows the context is cut on its left.
  ids = text_model.tokenizer.encode(f"{session.conversation.text}\nxyz")
  assert session.conversation.prompt("xyz", 2) == ids[-2:]
  assert session.conversation.prompt("xyz", 0) == []


def test_a_terminal_sees_masks_become_text_and_keeps_the_text(text_model):
  session, out = session_of(text_model, terminal=True)
  talk(session, script("to be"))
  shown = out.getvalue()
  assert MASK_GLYPH * 16 in shown and "16 masked" in shown and "0 masked" in shown
  assert "\x1b[38;2;" in shown  # confidence as colour
  plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
  answer = session.conversation.text.removeprefix("to be").translate(PICTURES)
  assert "".join(answer.split()) in "".join(plain.split())


def test_a_conversation_is_kept_in_a_file(chat_model, tmp_path):
  session, _ = session_of(chat_model)
  path = tmp_path / "said.json"
  talk(session, script("/system be brief", "to be", f"/save {path}", "/reset"))
  assert session.conversation.messages == []
  again, out = session_of(chat_model)
  talk(again, script(f"/load {path}"))
  roles = [message["role"] for message in again.conversation.messages]
  assert roles == ["system", "user", "assistant"]
  path.write_text(json.dumps({"text": "x"}))
  talk(again, script(f"/load {path}", f"/load {path}.gone"))
  assert "has no 'messages'" in out.getvalue() and "No such file" in out.getvalue()
  assert len(again.conversation.messages) == 3


def test_the_sampler_is_set_and_bad_lines_leave_everything_as_it_was(chat_model):
  session, out = session_of(chat_model)
  lines = ["/set gen_length=8", "/set gen_length=7", "/set nonsense=1", "/set", "/save", "/dance"]
  talk(session, script(*lines, "/help", "x" * 500))
  assert session.sampler.gen_length == 8
  shown = out.getvalue()
  for part in (
    "gen_length 7 is not a multiple of block_length 8", "nonsense", "temperature: float = 0.9",
    "/save needs the name of a file", "there is no command /dance", "Ctrl-C stops an answer",
    "/reset begins anew",
  ):  # fmt: skip
    assert part in shown
  assert session.conversation.messages == [] and session.replays == []


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_stops_the_answer_and_keeps_what_was_written(text_model, terminal, monkeypatch):
  session, out = session_of(text_model, terminal=terminal)
  take, blocks = Answer.take, []

  def interrupted(answer, *block):
    blocks.append(block)
    text = take(answer, *block)
    raise KeyboardInterrupt if len(blocks) == 1 else AssertionError(text)

  monkeypatch.setattr(Answer, "take", interrupted)
  talk(session, script("to be", "/help"))
  assert len(blocks) == 1 and "stopped" in out.getvalue() and "/quit" in out.getvalue()
  first = text_model.generate("to be", seed=0)
  assert session.conversation.text.startswith("to be")
  written = session.conversation.text.removeprefix("to be")
  assert 0 < len(written) < len(first) and first.startswith(written)
  monkeypatch.undo()
  session._seed -= 1
  session.command("reset")
  talk(session, script("to be"))  # the engine has forgotten the stopped one
  assert session.conversation.text == "to be" + first


def test_a_failure_is_told_and_the_next_line_is_answered(text_model, monkeypatch):
  session, out = session_of(text_model)
  failures = [RuntimeError("out of memory")]
  step = Engine.step

  def failing(engine):
    if failures:
      raise failures.pop()
    return step(engine)

  monkeypatch.setattr(Engine, "step", failing)
  talk(session, script("to be", "\udcff", "to be"))
  assert "error: out of memory" in out.getvalue() and "surrogates not allowed" in out.getvalue()
  assert session.conversation.text == "to be" + text_model.generate("to be", seed=0)


def test_a_record_is_a_page_and_a_gif(text_model, tmp_path):
  session, _ = session_of(text_model, record=str(tmp_path / "said"))
  talk(session, script("to be", "or"))
  page = (tmp_path / "said.html").read_text()
  assert page.count('"prompt":') == 2
  assert (tmp_path / "said.gif").read_bytes()[:6] == b"GIF89a"
  replay = session.replays[0]
  assert session.conversation.text.startswith("to be" + "".join(replay.texts) + "\nor")


def test_an_answer_ends_where_its_text_ends():
  answer = Answer(Bytes().decode, (256,), 8)
  block = {"ticket": 0, "nfe": 2, "confidence": [0.5] * 4, "revealed_at": [1, 0, 1, 0]}
  # The first block holds the end of the prompt, as it does where blocks are aligned.
  assert answer.take(Update(first=-2, tokens=[1, 2, 97, 98], done=False, **block), 0.5) == "ab"
  assert (answer.ids, answer.revealed_at, answer.over) == ([97, 98], [1, 0], False)
  assert answer.screen(1).renderables[0].plain == MASK_GLYPH + "b" + 6 * MASK_GLYPH
  assert answer.take(Update(first=2, tokens=[99, 256, 97, 98], done=True, **block), 0.5) == "c"
  assert (answer.text, answer.over, answer.facts()) == (
    "abc", True, "3 tokens, 2 passes, 1.50 tokens per pass, 3.0 tokens/s"
  )  # fmt: skip
  assert answer.screen(2).renderables[0].plain == "abc"


def test_what_was_there_before_is_shown_and_kept():
  answer = Answer(Bytes().decode, (256,), 4)
  block = {"ticket": 0, "nfe": 3, "confidence": [0.5] * 4, "revealed_at": [-1, 2, 0, 1]}
  before = [
    Earlier(place=1, at=0, token=120, confidence=0.25),
    Earlier(place=1, at=1, token=None, confidence=0.0),
    Earlier(place=3, at=0, token=121, confidence=0.5),  # after the end of the text
  ]
  answer.take(Update(first=-1, tokens=[1, 97, 98, 256], done=True, earlier=before, **block), 0.5)
  screens = [answer.screen(number).renderables for number in range(4)]
  assert [canvas.plain for canvas, _ in screens] == [
    2 * MASK_GLYPH, "xb", MASK_GLYPH + "b", "ab"
  ]  # fmt: skip
  assert [facts.plain.split(", ")[-1] for _, facts in screens] == [
    "2 masked", "0 masked", "1 masked", "0 masked"
  ]  # fmt: skip
  replay = answer.replay("")
  assert [(one.place, one.text) for one in replay.earlier] == [(0, "x"), (0, None)]


def test_a_system_message_is_one(chat_model):
  conversation = Conversation(chat_model)
  conversation.add("a", "b")
  conversation.system("x")
  conversation.system("y")
  assert [m["content"] for m in conversation.messages] == ["y", "a", "b"]
