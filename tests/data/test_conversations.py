"""Conversations: what is a line and what is not, with file and line in every error."""

import gzip
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from lladax.data import conversations
from lladax.data.conversations import (
  Conversation,
  ConversationError,
  Message,
  check_conversations,
  conversation_files,
  parse_conversation,
  parse_preference,
  read_conversations,
  read_preferences,
)
from lladax.hub import chat

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
GOOD = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


def write(path, *lines):
  path.write_text(
    "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
  )
  return str(path)


def test_roles_are_those_of_the_chat_templates():
  assert conversations.ROLES == chat.ROLES


def test_a_conversation(tmp_path):
  turns = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER, USER]
  path = write(tmp_path / "a.jsonl", "", {"messages": turns, "id": 7, "metadata": {"task": "sum"}})
  (found,) = read_conversations(path)
  assert [message.as_dict() for message in found.messages] == turns
  assert (found.where, found.id, found.metadata) == (f"{path}:2", "7", {"task": "sum"})
  assert found.answers == [2, 4]


@pytest.mark.parametrize(
  "pair",
  [
    PAIR,
    {"messages": [USER], "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "5"}]},
  ],
)
def test_a_preference_pair_in_all_its_spellings(tmp_path, pair):
  (found,) = read_preferences(write(tmp_path / "a.jsonl", pair))
  assert found.prompt == (Message("user", "2+2?"),)
  assert (found.chosen, found.rejected) == ("4", "5")


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[" * 100_000, "not JSON that can be read"),
    ("[]", "expected an object like .*, got a list"),
    ("null", "expected an object like .*, got null"),
    ({}, "messages is missing"),
    ({"message": []}, "unknown field message; known: messages, id, metadata"),
    ({**GOOD, "weight": 2}, "unknown field weight"),
    ({**GOOD, "id": 1.5}, "id: expected text or a whole number, got the number 1.5"),
    ({**GOOD, "id": True}, "id: expected text or a whole number, got true"),
    ({**GOOD, "metadata": "x"}, "metadata: expected an object, got the text 'x'"),
    ({"messages": "hi"}, "messages: expected a list of messages, got the text 'hi'"),
    ({"messages": []}, "messages: expected at least one message, got none"),
    ({"messages": ["hi"]}, r"messages\[0\]: expected a role and a content, got the text 'hi'"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
    ({"messages": [{**USER, "name": "x"}]}, r"unknown field messages\[0\].name"),
    ({"messages": [{**USER, "role": "human"}]}, "role: expected one of system, user, .* got 'human'"),
    ({"messages": [{**USER, "role": ["user"]}]}, r"got \['user'\]"),
    ({"messages": [{**USER, "content": 4}]}, r"\[0\].content: expected text, got the number 4"),
    ({"messages": [{**USER, "content": None}]}, r"\[0\].content: expected text, got null"),
    ({"messages": [USER, {**ANSWER, "content": " \n"}]}, r"messages\[1\].content is empty"),
    ({"messages": [{**USER, "content": "a\ud800"}, ANSWER]}, "half a surrogate pair at 1"),
    ({"messages": [ANSWER]}, r"messages\[0\]: the user speaks first, got the assistant"),
    ({"messages": [{"role": "system", "content": "x"}, ANSWER]}, r"messages\[1\]: the user speaks"),
    ({"messages": [{"role": "system", "content": "x"}]}, "nobody but the system speaks"),
    ({"messages": [USER, {"role": "system", "content": "x"}]}, r"messages\[1\]: the system speaks"),
    ({"messages": [USER, ANSWER, ANSWER]}, r"messages\[2\]: the assistant answers twice"),
    ({"messages": [USER]}, "no message of the assistant"),
    (PAIR, "this is a preference pair"),
    ('{"messages": [], "messages": []}', "the field 'messages' occurs twice"),
  ],
)  # fmt: skip
def test_what_is_no_conversation_is_told_with_file_and_line(tmp_path, line, message):
  path = write(tmp_path / "a.jsonl", GOOD, line)
  with pytest.raises(ConversationError, match=message) as error:
    list(read_conversations(path))
  assert str(error.value).startswith(f"{path}:2: ")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "line, message",
  [
    (GOOD, "this is a conversation"),
    ({"prompt": "x", "chosen": "4"}, "rejected is missing"),
    ({**PAIR, "messages": [USER]}, "unknown field prompt; known: messages, chosen"),
    ({**PAIR, "rejected": "4"}, "chosen and rejected are the same text"),
    ({**PAIR, "rejected": ""}, "rejected is empty"),
    ({**PAIR, "chosen": [USER]}, r"chosen\[0\].role: expected assistant, got 'user'"),
    ({**PAIR, "chosen": []}, "chosen: expected text or one message, got 0 messages"),
    ({**PAIR, "prompt": [USER, ANSWER]}, "prompt ends with the assistant"),
    ({**PAIR, "prompt": 3}, "prompt: expected a list of messages, got the number 3"),
  ],
)
def test_what_is_no_preference_pair(tmp_path, line, message):
  with pytest.raises(ConversationError, match=message):
    list(read_preferences(write(tmp_path / "a.jsonl", line)))


def test_the_check_counts_both_kinds(tmp_path):
  path = write(tmp_path / "a.jsonl", GOOD, {"messages": [USER, ANSWER, USER]}, PAIR)
  assert check_conversations(path) == {
    "files": 1, "conversations": 2, "preferences": 1, "messages": 7, "answers": 2, "unanswered": 1,
    "messages of the user": 4, "messages of the assistant": 3, "characters": 20,
  }  # fmt: skip


def test_the_check_tells_of_all_that_is_wrong(tmp_path):
  path = write(tmp_path / "a.jsonl", GOOD, "{", PAIR, {"messages": []}, *["[]"] * 30)
  with pytest.raises(ConversationError) as error:
    check_conversations(path, max_errors=5)
  lines = str(error.value).splitlines()
  assert [line.split(": ")[0] for line in lines[:2]] == [f"{path}:2", f"{path}:4"]
  assert len(lines) == 6 and lines[-1] == "gave up after 5 errors"
  with pytest.raises(ConversationError, match="every line is blank"):
    check_conversations(write(tmp_path / "b.jsonl", ""))


def test_files_patterns_folders_and_gzip(tmp_path):
  one, two = (write(tmp_path / f"{name}.jsonl", GOOD) for name in ("one", "two"))
  packed = tmp_path / "z.jsonl.gz"
  packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))
  (tmp_path / "README.md").write_text("no conversation")
  expected = [tmp_path / "one.jsonl", tmp_path / "two.jsonl", packed]
  for paths in (str(tmp_path), str(tmp_path / "*.jsonl*"), [one, two, str(packed)]):
    assert conversation_files(paths) == expected
    assert [entry.messages for entry in read_conversations(paths)] == [
      (Message("user", "2+2?"), Message("assistant", "4"))
    ] * 3
  with pytest.raises(FileNotFoundError, match=r"no conversations at '.*nothing.*'"):
    conversation_files(str(tmp_path / "nothing*"))


def test_damaged_files(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\n")
  with pytest.raises(ConversationError, match=r"a.jsonl:2: not UTF-8 at byte 0"):
    list(read_conversations(str(path)))
  packed = gzip.compress(
    b"".join(json.dumps({**GOOD, "id": i}).encode() + b"\n" for i in range(999))
  )
  (tmp_path / "b.jsonl.gz").write_bytes(packed[:-20])
  with pytest.raises(ConversationError, match=r"b.jsonl.gz:\d+: damaged gzip"):
    list(read_conversations(str(tmp_path / "b.jsonl.gz")))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_what_was_written_is_read(turns):
  messages = [
    {"role": role, "content": content}
    for turn in turns
    for role, content in zip(("user", "assistant"), turn, strict=True)
  ]
  for ascii_only in (True, False):
    line = json.dumps({"messages": messages}, ensure_ascii=ascii_only)
    found = parse_conversation(line, "x:1")
    assert [message.as_dict() for message in found.messages] == messages


JSON = st.recursive(
  st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(["messages", "role", "content", "prompt", "chosen", "rejected", "id"]),
      inner,
      max_size=4,
    )
  ),
  max_leaves=12,
)


@hypothesis.settings(deadline=None)
@hypothesis.given(JSON)
def test_anything_is_a_conversation_or_a_clear_error(value):
  for parse in (parse_conversation, parse_preference):
    try:
      parsed = parse(json.dumps(value), "x:1")
    except ConversationError as error:
      assert str(error).startswith("x:1: ")
    else:
      assert isinstance(parsed, Conversation) and parsed.answers or parsed.chosen
