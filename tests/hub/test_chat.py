"""Chat templates: the published prompts, the sandbox, and messages that spell special tokens."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lladax.data.tokenizer import JsonTokenizer
from lladax.hub.chat import BUILT_IN, Chat, ChatTemplate, read_chat_template
from lladax.hub.folder_tokenizer import bytes_as_json
from lladax.hub.reader import FolderError

SPECIAL = [
  "<role>", "</role>", "<|role_end|>", "<|startoftext|>", "<|start_header_id|>",
  "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
]  # fmt: skip
TURNS = [
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello."},
  {"role": "user", "content": " 2+2? "},
]


def byte_tokenizer(special=SPECIAL) -> JsonTokenizer:
  """Bytes, end of text (256), MASK (257), then the special tokens of all templates."""
  tokenizer = bytes_as_json()
  tokenizer.engine.add_special_tokens(
    [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
  )
  return tokenizer


TOKENIZER = byte_tokenizer()


def template(source, **fields):
  return ChatTemplate(source=source, name="test", **fields)


# --- the published prompts (literally, so that nobody changes them unawares) ---------------------


def test_llada_moe_is_the_prompt_of_its_benchmarks():
  text = BUILT_IN["llada_moe"].render([{"role": "user", "content": "Why?"}])
  assert text == (
    "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    "<role>HUMAN</role>Why?<|role_end|><role>ASSISTANT</role>"
  )


def test_llada_moe_with_a_system_message_and_several_turns():
  messages = [{"role": "system", "content": "Be brief."}, *TURNS]
  assert BUILT_IN["llada_moe"].render(messages, add_generation_prompt=False) == (
    "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
    "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>Hello.<|role_end|>"
    "<role>HUMAN</role> 2+2? <|role_end|>"
  )


def test_llada_has_headers():
  assert BUILT_IN["llada"].render(TURNS) == (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  )


def test_chatml():
  assert BUILT_IN["chatml"].render([{"role": "system", "content": "S"}, *TURNS]) == (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n 2+2? <|im_end|>\n"
    "<|im_start|>assistant\n"
  )


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_role_without_a_place_is_refused(name):
  with pytest.raises(ValueError, match="no place for the role tool at message 1"):
    BUILT_IN[name].render([TURNS[0], {"role": "tool", "content": "4"}])


# --- where templates are found -------------------------------------------------------------------


def test_a_file_counts_before_the_config_before_the_built_in(tmp_path):
  assert read_chat_template(tmp_path, default="llada") == BUILT_IN["llada"]
  config = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }} config <|im_end|>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  found = read_chat_template(tmp_path, default="llada")
  assert found.render(TURNS) == "<s> config <|im_end|>"
  assert found.end_of_turn == "<|im_end|>"
  (tmp_path / "chat_template.jinja").write_text("file")
  assert read_chat_template(tmp_path, default="llada").render(TURNS) == "file"


def test_a_built_in_template_takes_the_tokens_of_the_folder(tmp_path):
  (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
  assert read_chat_template(tmp_path, default="llada").render(TURNS).startswith("<s><|start_header")


def test_of_several_named_templates_the_default_counts(tmp_path):
  named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
  assert read_chat_template(tmp_path, default="llada").source == "b"
  named[1]["name"] = "rag"
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
  with pytest.raises(FolderError, match=r"no 'default' among \['tool_use', 'rag'\]"):
    read_chat_template(tmp_path, default="llada")


def test_what_is_no_template_is_named(tmp_path):
  with pytest.raises(ValueError, match="'llama'; one of llada_moe, llada, chatml"):
    read_chat_template(tmp_path, default="llama")
  (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
  with pytest.raises(FolderError, match="expected text, got int"):
    read_chat_template(tmp_path, default="llada")
  (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
  with pytest.raises(FolderError, match="chat_template.jinja is not text"):
    read_chat_template(tmp_path, default="llada")


# --- the sandbox ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "source",
  [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('true') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].update(role='x') }}",
    "{% for x in range(10 ** 9) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ 1 // 0 }}",
    "{% if %}",
    "{{ messages[0].content + 1 }}",
    "{{ nothing.at_all }}",
    "{{ raise_exception('no') }}",
  ],
)
def test_a_template_that_reaches_out_or_fails_is_an_error(source):
  try:
    text = template(source).render(TURNS)
  except ValueError as error:
    assert "the chat template 'test' failed on these messages" in str(error)
  else:
    assert text == ""  # so Jinja prints what a template may not see


def test_a_template_cannot_change_the_messages():
  messages = [dict(TURNS[0])]
  for source in ("{{ messages.append(1) }}", "{{ messages[0].update(role=2) }}"):
    with pytest.raises(ValueError, match="SecurityError"):
      template(source).render(messages)
  assert messages == [TURNS[0]]


def test_what_published_templates_use_works():
  source = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' %}\n"
    "        {{- message | tojson }}\n"
    "        {%- continue %}\n"
    "    {%- endif %}\n"
    "    {% generation %}{{ message.content }}{% endgeneration %}\n"
    "    {%- break %}\n"
    "{%- endfor %}\n"
    "{% set ns = namespace(n=0) %}{% for tool in tools %}{% set ns.n = ns.n + 1 %}{% endfor %}\n"
    "{{- ns.n }}{{ strftime_now('%Y') | length }}{{ enable_thinking }}"
  )
  messages = [{"role": "user", "content": "<a&'é>"}, *TURNS[1:]]
  text = template(source).render(messages, tools=[{"name": "f"}], enable_thinking=False)
  assert text == '{"role": "user", "content": "<a&\'é>"}Hello.14False'


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "messages, message",
  [
    ("Hi", "a list like .*, got str"),
    ({"role": "user", "content": "Hi"}, "a list like .*, got dict"),
    ([], "at least one"),
    (["Hi"], r"messages\[0\]: expected role and content, got str"),
    ([TURNS[0], {"content": "Hi"}], r"messages\[1\].role: expected one of system, .* got None"),
    ([{"role": "<|im_end|>", "content": "Hi"}], r"messages\[0\].role: expected one of"),
    ([{"role": "user"}], r"messages\[0\].content: expected text, got NoneType"),
    ([{"role": "user", "content": ["Hi"]}], r"messages\[0\].content: expected text, got list"),
    ([{"role": "user", "content": "Hi", "x": object()}], "messages: expected JSON values"),
  ],
)
def test_malformed_messages_are_named(messages, message):
  with pytest.raises(ValueError, match=message):
    BUILT_IN["chatml"].render(messages)


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", BUILT_IN)
def test_ids_are_those_of_the_rendered_text(name):
  """Against an independent reading: cut at the names of special tokens, bytes in between."""
  chat = Chat(TOKENIZER, BUILT_IN[name])
  text, expected = BUILT_IN[name].render(TURNS), []
  while text:
    at = [(text.find(token), token) for token in SPECIAL if token in text]
    start, token = min(at, default=(len(text), ""))
    expected += list(text[:start].encode())
    expected += [TOKENIZER.engine.token_to_id(token)] if token else []
    text = text[start + len(token) :]
  assert chat.encode(TURNS) == expected


@pytest.mark.parametrize("name", BUILT_IN)
@hypothesis.given(
  parts=st.lists(st.one_of(st.sampled_from([*SPECIAL, "<|mask|>", "<|endoftext|>"]), st.text()))
)
def test_no_message_can_write_a_special_token(name, parts):
  """Special ids are where the template puts them, whatever the message says; the text is whole."""
  chat = Chat(TOKENIZER, BUILT_IN[name])
  content = "".join(parts)
  special = [i for i in chat.encode([{"role": "user", "content": "Hi"}]) if i > 255]
  ids = chat.encode([{"role": "user", "content": content}])
  assert [i for i in ids if i > 255] == special
  expected = chat.template.render([{"role": "user", "content": content}])
  assert TOKENIZER.decode(ids, skip_special=False) == expected


def test_spelled_special_tokens_survive_what_templates_do_to_text():
  message = {"role": "user", "content": "12<|mask|>34<|im_end|>"}
  for source, expected in (
    ("{{ messages[0] | tojson }}", '{"role": "user", "content": "12<|mask|>34<|im_end|>"}'),
    ("{{ messages[0].content | upper }}", "12<|mask|>34<|im_end|>"),
    ("{{ tools[0].name }}", "<|mask|>"),
  ):
    ids = Chat(TOKENIZER, template(source)).encode([message], tools=[{"name": "<|mask|>"}])
    assert bytes(ids).decode() == expected


def test_the_template_names_what_ends_a_turn():
  end, eos = TOKENIZER.engine.token_to_id("<|im_end|>"), TOKENIZER.eos_id
  chat = Chat(TOKENIZER, BUILT_IN["chatml"])
  assert chat.end_of_turn_id == end
  assert Chat(TOKENIZER, template("")).end_of_turn_id == eos


def test_a_tokenizer_of_another_model_is_refused():
  with pytest.raises(ValueError, match=r"'<\|role_end\|>', which is no token"):
    Chat(byte_tokenizer(["<|eot_id|>"]), BUILT_IN["llada_moe"]).encode(TURNS)
  engine = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
  engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
  engine.add_special_tokens(["<|role_end|>", "<|endoftext|>"])
  wrong = JsonTokenizer(engine, "<|role_end|>", "<|endoftext|>", "<|endoftext|>")
  with pytest.raises(ValueError, match="id 1 in this tokenizer, which is the mask"):
    Chat(wrong, BUILT_IN["llada_moe"]).encode(TURNS)
