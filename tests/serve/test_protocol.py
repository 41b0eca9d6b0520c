"""Requests: what is taken, what is refused and in which words."""

import importlib
import sys

import pytest

from lladax.serve import Ask, Limits, RequestError, parse_chat, parse_completion

LIMITS = Limits(max_tokens=64, rows=4)


def complete(**body):
  return parse_completion(body, LIMITS)


def chat(**body):
  return parse_chat(body, LIMITS)


def test_prompts_are_texts_or_ids():
  assert complete(prompt="a").prompts == ("a",)
  assert complete(prompt=["a", "b"]).prompts == ("a", "b")
  assert complete(prompt=[1, 2]).prompts == ((1, 2),)
  assert complete(prompt=[[1, 2], [3]]).prompts == ((1, 2), (3,))
  assert complete(prompt="").prompts == ("",)


def test_everything_a_request_may_say():
  ask = complete(
    model="m", prompt="a", suffix="b", max_tokens=8, n=2, temperature=0.7, top_p=0.9, seed=-3,
    stop="x", stream=True, stream_options={"include_usage": True}, frames=True,
    sampler={"unmask": "Threshold(0.9)", "block_length": 8}, user="me", best_of=1, echo=False,
    frequency_penalty=0, presence_penalty=0.0, logit_bias={},
  )  # fmt: skip
  assert ask == Ask(
    model="m", prompts=("a",), suffix="b", max_tokens=8, n=2, temperature=0.7, top_p=0.9, seed=-3,
    stop=("x",), stream=True, include_usage=True, frames=True,
    sampler=("block_length=8", "unmask=Threshold(0.9)"),
  )  # fmt: skip


def test_null_means_nothing_was_said():
  nothing = {"suffix": None, "max_tokens": None, "stop": None, "logprobs": None, "tools": None}
  assert complete(prompt="a", **nothing) == complete(prompt="a")


def test_messages_may_come_in_parts_and_under_newer_names():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
  ask = chat(messages=messages, max_completion_tokens=4, max_tokens=9)
  assert [(m["role"], m["content"]) for m in ask.messages] == [
    ("system", "be brief"),
    ("user", "ab"),
  ]
  assert ask.max_tokens == 4


@pytest.mark.parametrize(
  "body, message, param",
  [
    ([], "the body is a JSON object; got a list", None),
    ("x", "the body is a JSON object; got a string", None),
    (None, "the body is a JSON object; got null", None),
    ({}, "prompt is missing", "prompt"),
    ({"prompt": 3}, "prompt: expected a string or a list, got 3", "prompt"),
    ({"prompt": []}, "prompt: expected a text, a list of texts", "prompt"),
    ({"prompt": ["a", 1]}, "prompt: expected a text, a list of texts", "prompt"),
    ({"prompt": [True]}, "prompt: expected a text", "prompt"),
    ({"prompt": [-1]}, "prompt: expected a text", "prompt"),
    ({"prompt": [[1], "a"]}, "prompt: expected a text", "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens: expected a whole number from 1 to 64", None),
    ({"prompt": "a", "max_tokens": 65}, "this server's limit, got 65", "max_tokens"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens: expected a whole number", "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "got True", "max_tokens"),
    ({"prompt": "a", "n": 5}, "1 prompts with n=5 are 5 answers; one request may ask for 4", "n"),
    ({"prompt": ["a"] * 3, "n": 2}, "are 6 answers", "n"),
    ({"prompt": "a", "temperature": 2.1}, "temperature: expected a number from 0 to 2", None),
    ({"prompt": "a", "temperature": float("nan")}, "got nan", "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p: expected a number above 0 and at most 1, got 0", None),
    ({"prompt": "a", "temperature": 10**400}, "temperature: expected a number", "temperature"),
    ({"prompt": "a", "seed": "x"}, "seed: expected a whole number of 64 bits, got 'x'", "seed"),
    ({"prompt": "a", "seed": 1 << 70}, "seed: expected a whole number of 64 bits", "seed"),
    ({"prompt": "a", "stop": ""}, "stop: expected a text or at most 16 texts", "stop"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop: expected", "stop"),
    ({"prompt": "a", "stop": [1]}, "stop: expected", "stop"),
    ({"prompt": "a", "stream": "yes"}, "stream: expected true or false, got 'yes'", "stream"),
    ({"prompt": "a", "echo": True}, "echo is not supported", "echo"),
    ({"prompt": "a", "logprobs": 3}, 'logprobs is not supported; "frames": true', "logprobs"),
    ({"prompt": "a", "logprobs": 0}, "logprobs is not supported", "logprobs"),  # of the written
    ({"prompt": "a", "stream_options": {"usage": True}}, "stream_options: expected", None),
    ({"prompt": "a", "stream_options": {"include_usage": 1}}, "stream_options: expected", None),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
    (
      {"prompt": "a", "temprature": 1},
      "unknown field 'temprature'; there are prompt",
      "temprature",
    ),
    ({"prompt": "a", "sampler": {"unmask": [1]}}, "sampler.unmask: expected a value", "sampler"),
  ],
)
def test_bad_completions_are_refused_with_the_field_and_what_was_expected(body, message, param):
  with pytest.raises(RequestError) as caught:
    parse_completion(body, LIMITS)
  error = caught.value.to_tree()["error"]
  assert message in error["message"] and caught.value.status == 400
  assert error["type"] == "invalid_request_error"
  assert param is None or error["param"] == param


@pytest.mark.parametrize(
  "messages, message",
  [
    ([], "messages: expected at least one"),
    (["hello"], r"messages\[0\]: expected an object with role and content, got a string"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content: parts are"),
    ("hello", "messages: expected a list, got 'hello'"),
  ],
)
def test_bad_messages_are_refused(messages, message):
  with pytest.raises(RequestError, match=message):
    chat(messages=messages)


def test_errors_have_the_kind_of_their_status():
  kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error"}
  kinds |= {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
  for status, kind in kinds.items():
    assert RequestError("x", status=status).to_tree()["error"]["type"] == kind


def test_bad_limits_are_errors():
  with pytest.raises(ValueError, match="rows is at least 1; got 0"):
    Limits(rows=0)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "fastapi", None)
  monkeypatch.delitem(sys.modules, "lladax.serve")
  with pytest.raises(ImportError, match=r"fastapi.*pip install 'lladax\[serve\]'"):
    importlib.import_module("lladax.serve")
