"""What a request asks for: OpenAI's JSON of completions and chat, checked field by field.

A field that lladax does not know is an error, and so is one that it cannot honour: an answer is
what was asked for, or there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Fields of OpenAI's that change nothing here, whatever they hold.
IGNORED = frozenset(
  {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
# Fields that lladax cannot honour, and the values that ask for nothing.
NEUTRAL: Mapping[str, tuple] = {
  "frequency_penalty": (0,),
  "presence_penalty": (0,),
  "logit_bias": ({},),
  "logprobs": (False,),
  "top_logprobs": (0,),
  "best_of": (1,),
  "echo": (False,),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "parallel_tool_calls": (True, False),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "reasoning_effort": ("none",),
}
MOST_STOPS = 16


class RequestError(Exception):
  """A request that gets an error for an answer.

  Attributes:
    status: of HTTP. param: the field it is about. code: for programs.
  """

  def __init__(
    self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
  ):
    super().__init__(message)
    self.status, self.param, self.code = status, param, code

  def to_tree(self) -> dict:
    """The error as OpenAI writes it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
    kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What one request may ask for.

  Attributes:
    max_tokens: to be written for one answer.
    rows: answers to one request, prompts times `n`.
    body_bytes: of a request.
  """

  max_tokens: int = 1024
  rows: int = 16
  body_bytes: int = 1 << 20

  def __post_init__(self):
    for name, value in vars(self).items():
      if value < 1:
        raise ValueError(f"{name} is at least 1; got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """A request, checked.

  Attributes:
    model: by which name; None for whatever is there.
    prompts: texts or ids; empty for a chat.
    messages: of a chat; empty for completions.
    suffix: text after what is to be written; None: nothing is there yet.
    max_tokens: to write; None: as many as the sampler says.
    n: answers per prompt.
    temperature, top_p: None: the sampler's.
    seed: of the first answer, the others count on; None: any.
    stop: an answer ends before the first of these.
    stream: whether answers are sent as they grow.
    include_usage: whether a stream ends with its numbers.
    frames: whether to tell when, and with which confidence, each token was written.
    sampler: further fields of the sampler as name=value.
  """

  model: str | None = None
  prompts: tuple[str | tuple[int, ...], ...] = ()
  messages: tuple[Mapping[str, Any], ...] = ()
  suffix: str | None = None
  max_tokens: int | None = None
  n: int = 1
  temperature: float | None = None
  top_p: float | None = None
  seed: int | None = None
  stop: tuple[str, ...] = ()
  stream: bool = False
  include_usage: bool = False
  frames: bool = False
  sampler: tuple[str, ...] = ()


def parse_completion(body: Any, limits: Limits) -> Ask:
  """The body of POST /v1/completions.

  Raises:
    RequestError: naming the field.
  """
  fields = _Fields(body)
  prompts = _prompts(fields.take("prompt", (str, list), required=True))
  suffix = fields.take("suffix", str)
  shared = _shared(fields, limits, ("max_tokens",), len(prompts))
  return Ask(prompts=prompts, suffix=suffix or None, **shared)


def parse_chat(body: Any, limits: Limits) -> Ask:
  """The body of POST /v1/chat/completions.

  Raises:
    RequestError: naming the field.
  """
  fields = _Fields(body)
  messages = _messages(fields.take("messages", list, required=True))
  return Ask(
    messages=messages, **_shared(fields, limits, ("max_completion_tokens", "max_tokens"), 1)
  )


class _Fields:
  """A JSON object whose fields are taken one by one; what is left at the end is unknown."""

  def __init__(self, body: Any):
    if not isinstance(body, dict):
      raise RequestError(f"the body is a JSON object; got {_kind(body)}", code="invalid_json")
    self._left = {name: value for name, value in body.items() if value is not None}

  def take(
    self,
    name: str,
    kinds: type | tuple[type, ...],
    *,
    required: bool = False,
    check: Callable[[Any], bool] = lambda value: True,
    expected: str = "",
  ):
    """The value of a field, None where there is none or it is null."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    value = self._left.pop(name, None)
    if value is None:
      if required:
        raise RequestError(f"{name} is missing", param=name, code="missing_required_parameter")
      return None
    expected = expected or " or ".join(_NAMES[kind] for kind in kinds)
    # A bool is an int in Python, not in JSON.
    fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if not (fits and check(value)):
      raise RequestError(
        f"{name}: expected {expected}, got {_short(value)}", param=name, code="invalid_value"
      )
    return value

  def done(self):
    for name in self._left.keys() & NEUTRAL.keys():
      if not any(_same(self._left[name], value) for value in NEUTRAL[name]):
        hint = ""
        if name in ("logprobs", "top_logprobs"):
          hint = '; "frames": true tells the confidence with which each token was written'
        raise RequestError(f"{name} is not supported{hint}", param=name, code="unsupported")
    unknown = sorted(self._left.keys() - NEUTRAL.keys() - IGNORED)
    if unknown:
      known = [field.name for field in dataclasses.fields(Ask)]
      raise RequestError(
        f"unknown field {unknown[0]!r}; there are prompt, messages, stream_options and "
        + ", ".join(name for name in known if name not in ("prompts", "messages", "include_usage")),
        param=unknown[0],
        code="unknown_parameter",
      )


_NAMES = {
  str: "a string", list: "a list", dict: "an object", int: "a whole number", float: "a number",
  bool: "true or false",
}  # fmt: skip


def _same(a: Any, b: Any) -> bool:
  # Python takes 0 for False; to OpenAI `logprobs: 0` asks for those of the written tokens.
  return a == b and isinstance(a, bool) == isinstance(b, bool)


def _kind(value: Any) -> str:
  return next((name for kind, name in _NAMES.items() if type(value) is kind), "null")


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _shared(fields: _Fields, limits: Limits, lengths: Sequence[str], prompts: int) -> dict:
  """The fields that completions and chat have in common."""
  most = limits.max_tokens
  given = [
    fields.take(
      name,
      int,
      check=lambda x: 1 <= x <= most,
      expected=f"a whole number from 1 to {most}, this server's limit",
    )
    for name in lengths
  ]
  n = fields.take("n", int, check=lambda x: x >= 1, expected="a whole number of at least 1") or 1
  if prompts * n > limits.rows:
    raise RequestError(
      f"{prompts} prompts with n={n} are {prompts * n} answers; one request may ask for "
      f"{limits.rows} at most",
      param="n",
      code="too_many_answers",
    )
  shared = {
    "model": fields.take("model", str),
    "max_tokens": next((x for x in given if x is not None), None),
    "n": n,
    "temperature": _number(fields, "temperature", 0, 2),
    "top_p": _number(fields, "top_p", 0, 1, open_below=True),
    "seed": fields.take(
      "seed", int, check=lambda x: abs(x) < 1 << 63, expected="a whole number of 64 bits"
    ),
    "stop": _stops(fields.take("stop", (str, list))),
    "stream": bool(fields.take("stream", bool)),
    "include_usage": _include_usage(fields.take("stream_options", dict) or {}),
    "frames": bool(fields.take("frames", bool)),
    "sampler": _assignments(fields.take("sampler", dict)),
  }
  fields.done()
  return shared


def _number(fields: _Fields, name: str, low: float, high: float, *, open_below=False):
  def fits(value):  # NaN lies nowhere
    return low <= value <= high and not (open_below and value == low)

  edge = f"above {low} and at most {high}" if open_below else f"from {low} to {high}"
  value = fields.take(name, (int, float), check=fits, expected=f"a number {edge}")
  return None if value is None else float(value)


def _prompts(value: Any) -> tuple:
  if isinstance(value, str):
    return (value,)
  error = RequestError(
    "prompt: expected a text, a list of texts, a list of ids or a list of lists of ids, got "
    f"{_short(value)}",
    param="prompt",
    code="invalid_value",
  )
  if not value:
    raise error
  if all(isinstance(item, str) for item in value):
    return tuple(value)
  rows = [value] if all(_is_id(item) for item in value) else value
  if not all(isinstance(row, list) and all(_is_id(item) for item in row) for row in rows):
    raise error
  return tuple(tuple(row) for row in rows)


def _is_id(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _messages(value: list) -> tuple:
  if not value:
    raise RequestError("messages: expected at least one", param="messages", code="invalid_value")
  return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(value))


def _message(message: Any, path: str) -> dict:
  if not isinstance(message, dict):
    raise RequestError(
      f"{path}: expected an object with role and content, got {_kind(message)}",
      param="messages",
      code="invalid_value",
    )
  content = message.get("content")
  if isinstance(content, list):  # parts
    texts = [
      part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
      for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
      raise RequestError(
        f'{path}.content: parts are text here: {{"type": "text", "text": ...}}',
        param="messages",
        code="unsupported",
      )
    content = "".join(texts)
  # OpenAI's newer name of the same thing.
  role = "system" if message.get("role") == "developer" else message.get("role")
  return {**message, "role": role, "content": content}


def _include_usage(options: dict) -> bool:
  given = {name: value for name, value in options.items() if value is not None}
  # OpenAI's padding of pieces, so that their length tells an eavesdropper nothing: not here.
  padding = given.pop("include_obfuscation", False)
  usage = given.pop("include_usage", False)
  if given or padding is not False or not isinstance(usage, bool):
    raise RequestError(
      f'stream_options: expected {{"include_usage": true or false}}, got {_short(options)}',
      param="stream_options",
      code="invalid_value",
    )
  return usage


def _stops(value: str | list | None) -> tuple[str, ...]:
  stops = [value] if isinstance(value, str) else value or []
  fits = all(isinstance(stop, str) and 0 < len(stop) <= 256 for stop in stops)
  if not fits or len(stops) > MOST_STOPS:
    raise RequestError(
      f"stop: expected a text or at most {MOST_STOPS} texts of 1 to 256 characters, got "
      f"{_short(value)}",
      param="stop",
      code="invalid_value",
    )
  return tuple(stops)


def _assignments(value: dict | None) -> tuple[str, ...]:
  for name, content in (value or {}).items():
    if not isinstance(content, str | int | float | bool | None) or len(str(content)) > 256:
      raise RequestError(
        f'sampler.{name}: expected a value as on the command line, such as "Threshold(0.9)", got '
        f"{_short(content)}",
        param="sampler",
        code="invalid_value",
      )
  return tuple(f"{name}={content}" for name, content in sorted((value or {}).items()))
