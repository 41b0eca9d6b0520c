"""Messages to a prompt: the chat template of a folder, or a built-in one where it has none.

Templates are Jinja, as in a Hugging Face folder. They come from the network, so they run in Jinja's
immutable sandbox and see plain data only. Text of a message that spells a special token is encoded
as text: only the template itself can end a turn.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from lladax.data.tokenizer import JsonTokenizer
from lladax.hub.ids import end_of_turn_id, token_text, tokenizer_config
from lladax.hub.reader import FolderError
from lladax.hub.sandbox import compile_template

ROLES = ("system", "user", "assistant", "tool")
# Tokens with which published templates end a turn; the first one that a template spells counts.
ENDS_OF_TURN = ("<|role_end|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
# Names that a tokenizer_config.json gives to special tokens, all visible to its template.
TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

_NO_TOOLS = (
  "{{ raise_exception('the built-in template has no place for the role ' ~ message.role"
  " ~ ' at message ' ~ loop.index0) }}"
)

# The one-turn prompt of dInfer's benchmarks (repository inclusionAI/dInfer). A system message stands
# where the template of Ling 2.0, whose tokenizer family this is, puts it.
_LLADA_MOE = (
  "<role>SYSTEM</role>"
  "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}"
  "detailed thinking off<|role_end|>"
  "{% for message in messages %}"
  "{% if message.role == 'user' %}{{ '<role>HUMAN</role>' + message.content }}<|role_end|>"
  "{% elif message.role == 'assistant' %}"
  "{{ '<role>ASSISTANT</role>' + message.content }}<|role_end|>"
  "{% elif not (loop.first and message.role == 'system') %}" + _NO_TOOLS + "{% endif %}"
  "{% endfor %}"
  "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)

# LLaDA-8B-Instruct and LLaDA-1.5 (arXiv 2502.09992): headers in the manner of Llama 3.
_LLADA = (
  "{{ bos_token | default('<|startoftext|>') }}"
  "{% for message in messages %}"
  "{% if message.role == 'tool' %}" + _NO_TOOLS + "{% endif %}"
  "<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\\n\\n' }}"
  "{{ message.content | trim }}<|eot_id|>"
  "{% endfor %}"
  "{% if add_generation_prompt %}"
  "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)

# Qwen2.5 and Dream. Without a system message there is none: the released folders have templates of
# their own, with their own default.
_CHATML = (
  "{% for message in messages %}"
  "{% if message.role == 'tool' %}" + _NO_TOOLS + "{% endif %}"
  "<|im_start|>{{ message.role + '\\n' + message.content }}<|im_end|>{{ '\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)


# For models whose tokenizer has no special tokens to spare: roles as words. A message can imitate
# them, which the other templates exclude.
_PLAIN = (
  "{% for message in messages %}"
  "{% if message.role == 'tool' %}" + _NO_TOOLS + "{% endif %}"
  "{{ message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}Assistant:{{ '\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
  """A Jinja chat template.

  Attributes:
    source: the template.
    name: for messages: of the built-in template, or where it was found.
    end_of_turn: the token that ends a turn; None: end of text does.
    special_tokens: (name, token) as `tokenizer_config.json` has them, e.g. ("bos_token", "<s>").
    spells: special tokens that it spells by name; known of the built-in ones only.
  """

  source: str
  name: str
  end_of_turn: str | None = None
  special_tokens: tuple[tuple[str, str], ...] = ()
  spells: tuple[str, ...] = ()

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
  ) -> str:
    """The prompt as text, special tokens spelled by name.

    Args:
      messages: each with a `role` of `ROLES` and a `content`; whatever else the template reads.
      add_generation_prompt: whether the text ends where the assistant begins.
      tools: JSON schemas of functions, where the template knows tools.
      **options: further variables of the template, such as `enable_thinking`.

    Raises:
      ImportError: without jinja2.
      ValueError: for malformed messages, a malformed template, or a template that refuses them.
    """
    check_messages(messages)
    known = {
      **dict(self.special_tokens),
      **_plain("options", options),
      "messages": _plain("messages", messages),
      "tools": _plain("tools", tools),
      "add_generation_prompt": add_generation_prompt,
    }
    try:
      return compile_template(self.source).render(known)
    except ImportError:
      raise
    except Exception as error:  # the template's own code: whatever it divides by zero
      raise ValueError(
        f"the chat template {self.name!r} failed on these messages: {type(error).__name__}: {error}"
      ) from None


BUILT_IN = {
  "llada_moe": ChatTemplate(
    source=_LLADA_MOE,
    name="llada_moe",
    end_of_turn="<|role_end|>",
    spells=("<role>", "</role>", "<|role_end|>"),
  ),
  "llada": ChatTemplate(
    source=_LLADA,
    name="llada",
    end_of_turn="<|eot_id|>",
    spells=("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
  ),
  "chatml": ChatTemplate(
    source=_CHATML,
    name="chatml",
    end_of_turn="<|im_end|>",
    spells=("<|im_start|>", "<|im_end|>"),
  ),
  "plain": ChatTemplate(source=_PLAIN, name="plain"),
}


def read_chat_template(folder: str | os.PathLike, *, default: str) -> ChatTemplate:
  """The template of a folder: `chat_template.jinja`, `tokenizer_config.json`, or a built-in one.

  Args:
    folder: of a released model; it need not have either file.
    default: a name in `BUILT_IN`.

  Raises:
    ValueError: for an unknown name.
    FolderError: for a file that is not what its name says.
  """
  if default not in BUILT_IN:
    raise ValueError(f"unknown chat template {default!r}; one of {', '.join(BUILT_IN)}")
  folder = pathlib.Path(folder)
  config = tokenizer_config(folder)
  tokens = tuple((name, token) for name in TOKEN_NAMES if (token := token_text(config.get(name))))
  file = folder / "chat_template.jinja"
  try:
    source = file.read_text(encoding="utf-8") if file.exists() else None
  except UnicodeDecodeError as error:
    raise FolderError(f"{file} is not text: {error}") from None
  if source is None:
    source = _configured(folder, config.get("chat_template"))
  if source is None:
    return dataclasses.replace(BUILT_IN[default], special_tokens=tokens)
  end = next((token for token in ENDS_OF_TURN if token in source), None)
  return ChatTemplate(source=source, name=str(folder), end_of_turn=end, special_tokens=tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
  """A tokenizer and a chat template: messages to ids, and the id that ends an answer."""

  tokenizer: JsonTokenizer
  template: ChatTemplate

  @functools.cached_property
  def end_of_turn_id(self) -> int:
    """The id that ends an answer; end of text where the template names none.

    Raises:
      ValueError: if the tokenizer has no such token, or has it as MASK.
    """
    token = self.template.end_of_turn
    if token is None:
      return self.tokenizer.eos_id
    return end_of_turn_id(self.tokenizer.engine, token, mask_id=self.tokenizer.mask_id)

  @functools.cached_property
  def _engine(self) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer.from_str(self.tokenizer.engine.to_str())
    engine.encode_special_tokens = False  # the template's special tokens are meant
    return engine

  @functools.cached_property
  def _special(self) -> re.Pattern[str]:
    added = self.tokenizer.engine.get_added_tokens_decoder().values()
    special = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special)) or r"(?!)")

  def encode(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
  ) -> list[int]:
    """Ids of the prompt: what the reference's tokenizer makes of the rendered text.

    One difference is meant: where a message spells a special token, it gets the ids of its
    characters, so that nobody ends a turn, or writes MASK, from inside a message. Added tokens that
    the tokenizer does not mark as special (`<think>` in many) mean themselves wherever they stand.

    Raises:
      ValueError: as `ChatTemplate.render`.
    """
    self.end_of_turn_id  # noqa: B018  a tokenizer of another model is refused here
    check_messages(messages)
    hidden = self._hide(messages, tools)
    text = self.template.render(
      hidden.messages, add_generation_prompt=add_generation_prompt, tools=hidden.tools, **options
    )
    return self._ids(text, hidden)

  def encode_turn(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
  ) -> tuple[list[int], list[int]]:
    """Prompt and answer of a conversation that ends with the assistant, to train on.

    The prompt is what `encode` gives for the messages before the last: what the model will see when
    it is asked. The answer is what the template adds to it for the last message, encoded apart as
    it will be generated, up to the end of the turn and with it.

    Raises:
      ValueError: as `encode`; if the last message is not the assistant's; for a template that does
        not write an answer after the prompt it generates, or does not end it.
    """
    self.end_of_turn_id  # noqa: B018
    check_messages(messages)
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
      raise ValueError("a turn to train on is an answer of the assistant, after other messages")
    hidden = self._hide(messages, tools)
    render = functools.partial(self.template.render, tools=hidden.tools, **options)
    prompt = render(hidden.messages[:-1], add_generation_prompt=True)
    whole = render(hidden.messages, add_generation_prompt=False)
    if not whole.startswith(prompt):
      raise ValueError(
        f"the chat template {self.template.name!r} begins an answer otherwise than the prompt it "
        f"generates, which ends with {prompt[-40:]!r}: it cannot be trained on"
      )
    answer = whole[len(prompt) :]
    if self.template.end_of_turn is not None:
      answer, end, _ = answer.partition(self.template.end_of_turn)
      if not end:
        raise ValueError(
          f"the chat template {self.template.name!r} does not end an answer with "
          f"{self.template.end_of_turn!r}"
        )
    elif not answer.startswith(hidden.messages[-1]["content"]):
      raise ValueError(
        f"the chat template {self.template.name!r} has no end of turn and changes the answer: "
        "nothing tells where it ends"
      )
    else:
      answer = hidden.messages[-1]["content"]
    return self._ids(prompt, hidden), [*self._ids(answer, hidden), self.end_of_turn_id]

  def _hide(self, messages, tools) -> _Hidden:
    """Takes spelled special tokens out of the messages.

    They travel through the template as numbers that occur nowhere else: digits survive what
    templates do to text (trim, upper, tojson).
    """
    digest = hashlib.sha256(repr((messages, tools)).encode("utf-8", "replace")).hexdigest()
    mark = str(int(digest, 16))
    spelled: list[str] = []

    def hide(match: re.Match[str]) -> str:
      spelled.append(match.group())
      return f"{mark}{len(spelled) - 1:06d}"

    messages, tools = (_map_text(hidden, self._special, hide) for hidden in (messages, tools))
    return _Hidden(messages, tools, mark, spelled)

  def _ids(self, text: str, hidden: _Hidden) -> list[int]:
    """Ids of rendered text, with what was hidden as the ids of its characters."""
    first, *others = text.split(hidden.mark)
    ids = self._engine.encode(first, add_special_tokens=False).ids
    for part in others:
      ids += self.tokenizer.encode(hidden.spelled[int(part[:6])])
      ids += self._engine.encode(part[6:], add_special_tokens=False).ids
    return ids


class _Hidden(NamedTuple):
  messages: Any
  tools: Any
  mark: str
  spelled: list[str]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError, naming message and field, unless the messages are as `render` wants them."""
  example = '[{"role": "user", "content": "..."}]'
  if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
    raise ValueError(f"messages: expected a list like {example}, got {type(messages).__name__}")
  if not messages:
    raise ValueError(f"messages: expected at least one, like {example}, got none")
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(f"messages[{i}]: expected role and content, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
      raise ValueError(f"messages[{i}].role: expected one of {', '.join(ROLES)}, got {role!r}")
    calls = role == "assistant" and content is None and message.get("tool_calls")
    if not isinstance(content, str) and not calls:
      raise ValueError(f"messages[{i}].content: expected text, got {type(content).__name__}")


def _configured(folder: pathlib.Path, entry: Any) -> str | None:
  """The template in `tokenizer_config.json`: text, or a list of named ones with a default."""
  if isinstance(entry, list):
    named = {str(e.get("name")): e.get("template") for e in entry if isinstance(e, Mapping)}
    entry = named.get("default", next(iter(named.values()), None) if len(named) == 1 else None)
    if entry is None:
      raise FolderError(
        f"{folder}: chat_template in tokenizer_config.json has no 'default' among {list(named)}"
      )
  if entry is not None and not isinstance(entry, str):
    raise FolderError(
      f"{folder}: chat_template in tokenizer_config.json: expected text, got {type(entry).__name__}"
    )
  return entry


def _plain(name: str, value: Any) -> Any:
  """A copy that is made of JSON values only: a template gets no object with methods of ours."""
  try:
    return json.loads(json.dumps(value))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{name}: expected JSON values: {error}") from None


def _map_text(value: Any, pattern: re.Pattern[str], replace: Any) -> Any:
  """The value with the pattern replaced in every text within."""
  if isinstance(value, str):
    return pattern.sub(replace, value)
  if isinstance(value, Mapping):
    return {key: _map_text(entry, pattern, replace) for key, entry in value.items()}
  if isinstance(value, Sequence):
    return [_map_text(entry, pattern, replace) for entry in value]
  return value
