"""Turns to train on, and tokenizers that carry their chat template."""

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from lladax.data.tokenizer import Bytes, JsonTokenizer, load_tokenizer, train_bpe
from lladax.hub.chat import BUILT_IN, Chat, ChatTemplate
from lladax.hub.chat_tokenizer import chat_tokenizer, read_chat, same_ids

NAMES = list(BUILT_IN)
TURNS = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": " Hello.\n"},
  {"role": "user", "content": " 2+2? "},
  {"role": "assistant", "content": "4"},
]
SPECIAL = [token for template in BUILT_IN.values() for token in template.spells]
BPE = train_bpe(["the cat sat on the mat and the assistant said hello " * 20], 300)


def chat_of(name, tokenizer=None):
  extended = chat_tokenizer(tokenizer or Bytes(), BUILT_IN[name])
  return Chat(extended, extended.template)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokenizer", [Bytes(), BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("last", [2, 4])
def test_a_turn_is_the_prompt_of_a_chat_and_what_is_to_be_written(name, tokenizer, last):
  chat = chat_of(name, tokenizer)
  prompt, answer = chat.encode_turn(TURNS[: last + 1])
  assert prompt == chat.encode(TURNS[:last])
  assert answer[-1] == chat.end_of_turn_id and answer.count(chat.end_of_turn_id) == 1
  content = TURNS[last]["content"]
  content = content.strip() if name == "llada" else content  # its template trims
  assert answer[:-1] == chat.tokenizer.encode(content)
  whole = chat.encode(TURNS[: last + 1], add_generation_prompt=False)
  if name != "plain":  # whose turns end with end of text, which its prompts do not show
    joined = chat.tokenizer.decode(prompt + answer, skip_special=False)
    assert chat.tokenizer.decode(whole, skip_special=False).startswith(joined)


@pytest.mark.parametrize("name", NAMES)
@hypothesis.settings(deadline=None)
@hypothesis.given(
  parts=st.lists(st.one_of(st.sampled_from([*SPECIAL, "<|mask|>", "<|endoftext|>"]), st.text()))
)
def test_an_answer_that_spells_special_tokens_is_whole(name, parts):
  """It ends where the template ends it, not where its text says so."""
  chat = chat_of(name)
  content = "".join(parts)
  expected = content.strip() if name == "llada" else content
  _, answer = chat.encode_turn([TURNS[1], {"role": "assistant", "content": content}])
  assert bytes(answer[:-1]) == expected.encode()  # bytes: no special id among them
  assert answer[-1] == chat.end_of_turn_id


def test_a_turn_ends_with_the_first_token_that_ends_one():
  source = "{% for m in messages %}{{ m.content }}<|im_end|>!<|im_end|>{% endfor %}"
  template = ChatTemplate(
    source=source, name="test", end_of_turn="<|im_end|>", spells=("<|im_end|>",)
  )
  chat = Chat(chat_tokenizer(Bytes(), template), template)
  assert chat.encode_turn(TURNS[1:3])[1] == [*b" Hello.\n", chat.end_of_turn_id]


@pytest.mark.parametrize(
  "source, end, message",
  [
    ("{{ messages[-1].content }}", None, "begins an answer otherwise"),
    (
      "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
      None,
      "no end of turn and changes the answer",
    ),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "<|im_end|>", "does not end an answer"),
  ],
)
def test_a_template_that_cannot_be_trained_on(source, end, message):
  template = ChatTemplate(source=source, name="test", end_of_turn=end, spells=("<|im_end|>",))
  chat = Chat(chat_tokenizer(Bytes(), template), template)
  with pytest.raises(ValueError, match=message):
    chat.encode_turn(TURNS[1:3])


@pytest.mark.parametrize("messages", [TURNS[:2], TURNS[2:3]])
def test_a_turn_ends_with_an_answer(messages):
  with pytest.raises(ValueError, match="an answer of the assistant, after other messages"):
    chat_of("chatml").encode_turn(messages)


@pytest.mark.parametrize("name", NAMES)
def test_missing_tokens_are_appended_and_all_other_ids_stay(name):
  template = BUILT_IN[name]
  extended = chat_tokenizer(BPE, template)
  first = BPE.vocab_size
  ids = [extended.engine.token_to_id(token) for token in template.spells]
  assert ids == list(range(first, first + len(ids)))
  assert extended.vocab_size == first + len(ids)
  assert extended.engine.get_vocab().items() >= BPE.engine.get_vocab().items()
  text = "the cat <|im_end|> said <role>"
  assert extended.encode(text) == BPE.encode(text)  # what text spells stays text
  again = chat_tokenizer(extended, template)
  assert again.engine.to_str() == extended.engine.to_str()


def test_bytes_keep_their_ids():
  extended = chat_tokenizer(Bytes(), BUILT_IN["llada_moe"])
  assert (extended.eos_id, extended.pad_id, extended.mask_id) == (256, 256, 257)
  assert extended.encode("é<role>") == Bytes().encode("é<role>")
  assert extended.byte_lengths.tolist() == [1] * 256 + [0] * 5


def test_a_model_without_room_is_refused():
  first = BPE.vocab_size
  assert chat_tokenizer(BPE, BUILT_IN["llada_moe"], vocab_size=first + 3).vocab_size == first + 3
  with pytest.raises(ValueError, match=rf"needs 3 more tokens .* ids {first} to {first + 2}, and"):
    chat_tokenizer(BPE, BUILT_IN["llada_moe"], vocab_size=first + 2)
  assert chat_tokenizer(BPE, BUILT_IN["plain"], vocab_size=first).vocab_size == first


def test_a_mask_that_ends_turns_is_refused():
  engine = tokenizers.Tokenizer.from_str(BPE.engine.to_str())
  engine.add_special_tokens(["<|role_end|>"])
  wrong = JsonTokenizer(engine, "<|role_end|>", "<|endoftext|>", "<|endoftext|>")
  with pytest.raises(ValueError, match="which is the mask of the model"):
    chat_tokenizer(wrong, BUILT_IN["llada_moe"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_chats_again(tmp_path, name):
  extended = chat_tokenizer(BPE, BUILT_IN[name])
  extended.save(tmp_path)
  chat = read_chat(tmp_path, load_tokenizer(tmp_path))
  assert chat.template == BUILT_IN[name]
  assert chat.encode(TURNS[:2]) == Chat(extended, BUILT_IN[name]).encode(TURNS[:2])
  BPE.save(tmp_path / "without")
  assert read_chat(tmp_path / "without", BPE) is None
  (tmp_path / "chat_template.json").write_text("{}")
  with pytest.raises(ValueError, match="does not describe a chat template"):
    read_chat(tmp_path, BPE)


def test_which_tokenizers_have_the_same_ids():
  other = train_bpe(["quite another text of other words " * 20], 290)
  assert same_ids(BPE, BPE) and same_ids(Bytes(), Bytes())
  for tokenizer in (Bytes(), BPE):
    extended = chat_tokenizer(tokenizer, BUILT_IN["llada_moe"])
    assert same_ids(tokenizer, extended) and not same_ids(extended, tokenizer)
    assert not same_ids(extended, chat_tokenizer(tokenizer, BUILT_IN["chatml"]))
  assert not same_ids(BPE, other) and not same_ids(Bytes(), BPE)
  mask_moved = JsonTokenizer(BPE.engine, "<|endoftext|>", "<|mask|>", "<|mask|>")
  assert not same_ids(BPE, mask_moved)
