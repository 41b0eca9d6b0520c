"""Laws of tokenizers: exact round trip, special ids never come from text, the cache is invisible."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from lladax.data import tokenizer as tokenizer_module
from lladax.data.tokenizer import (
  Bytes,
  cached_bpe,
  encode_with_masks,
  load_tokenizer,
  make_tokenizer,
  read_tokenizer_json,
  train_bpe,
)

TEXTS = ["the cat sat on the mat; <|mask|> the cat ate.\n" * 20, "Ünïcödé 数学 🙂 the end\n" * 20]
BPE = train_bpe(TEXTS, 300)
any_tokenizer = pytest.mark.parametrize("tokenizer", [Bytes(), BPE], ids=["bytes", "bpe"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("LLADAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@any_tokenizer
@hypothesis.given(text=st.text())
@hypothesis.example("\r\n\t\x00  \ufeff e\u0301 \u00e9 <|endoftext|><|mask|>")
def test_round_trip_is_exact_and_free_of_special_ids(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not {tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
  assert all(0 <= i < tokenizer.vocab_size for i in ids)
  assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@any_tokenizer
@hypothesis.given(texts=st.lists(st.text(), max_size=5))
def test_a_batch_encodes_as_its_texts_do(tokenizer, texts):
  batch = tokenizer.encode_batch(texts)
  assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
  assert all(ids.dtype == np.int32 for ids in batch)


@any_tokenizer
def test_special_ids_have_no_bytes_and_show_on_request(tokenizer):
  ids = [*tokenizer.encode("a"), tokenizer.mask_id, tokenizer.eos_id]
  assert tokenizer.decode(ids) == "a"
  assert tokenizer.decode(ids, skip_special=False) == "a<|mask|><|endoftext|>"
  assert tokenizer.byte_lengths[[tokenizer.mask_id, tokenizer.eos_id]].tolist() == [0, 0]
  assert tokenizer.mask_id != tokenizer.eos_id


@any_tokenizer
@pytest.mark.parametrize("bad", [-1, 300])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, bad):
  with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary of"):
    tokenizer.decode([65, bad])


@any_tokenizer
def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "saved")
  loaded = load_tokenizer(tmp_path / "saved")
  text = "the cat <|mask|> 数学"
  assert loaded.encode(text) == tokenizer.encode(text)
  for name in ("vocab_size", "mask_id", "eos_id", "pad_id"):
    assert getattr(loaded, name) == getattr(tokenizer, name)
  # The folder of a checkpoint can be named as a tokenizer.
  assert make_tokenizer(str(tmp_path / "saved")).encode(text) == loaded.encode(text)


@any_tokenizer
def test_masks_in_text(tokenizer):
  ids = encode_with_masks(tokenizer, "[M][M] b [M]", mask="[M]")
  mask = tokenizer.mask_id
  assert ids == [mask, mask, *tokenizer.encode(" b "), mask]
  assert encode_with_masks(tokenizer, "no masks") == tokenizer.encode("no masks")


def test_bpe_compresses_text_like_its_own():
  text = "the cat sat on the mat"
  assert len(BPE.encode(text)) < len(text) / 2
  assert BPE.vocab_size == 300


def test_bpe_training_is_deterministic():
  assert train_bpe(TEXTS, 300).engine.to_str() == BPE.engine.to_str()


def test_bpe_stops_where_the_text_does():
  assert train_bpe(["ab"], 5000).vocab_size == 259  # bytes, two special tokens, "ab"


@pytest.mark.parametrize("size", [0, 257])
def test_bpe_needs_room_for_the_bytes(size):
  with pytest.raises(ValueError, match=f"at least 258, got {size}"):
    make_tokenizer(f"bpe:{size}", TEXTS)


def test_bpe_needs_text():
  with pytest.raises(ValueError, match="no text"):
    train_bpe(["", ""], 300)


def test_the_cache_is_used_and_invisible(cache, monkeypatch):
  trained = cached_bpe(TEXTS, 300)
  assert len(list(cache.iterdir())) == 1  # no temporary file is left
  with monkeypatch.context() as patch:
    patch.setattr(tokenizer_module, "train_bpe", None)  # not called
    again = cached_bpe(TEXTS, 300)
  assert again.engine.to_str() == trained.engine.to_str()
  assert again.encode("<|mask|>") == trained.encode("<|mask|>")


def test_the_cache_knows_text_and_size(cache):
  cached_bpe(TEXTS, 300)
  cached_bpe(TEXTS, 301)
  cached_bpe([*TEXTS, "more"], 300)
  cached_bpe(["".join(TEXTS)], 300)  # a text more or less is another set of pairs
  assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0"', b"\xff"])
def test_a_damaged_cache_is_made_again(cache, content):
  cached_bpe(TEXTS, 300)
  (path,) = cache.iterdir()
  path.write_bytes(content)
  assert cached_bpe(TEXTS, 300).encode("the cat") == BPE.encode("the cat")
  assert json.loads(path.read_text())


def test_a_cache_that_cannot_be_written_is_no_error(cache):
  cache.write_text("a file where the folder should be")
  assert cached_bpe(TEXTS, 300).encode("the cat") == BPE.encode("the cat")


def word_tokenizer(words, added=(), *, special=True):
  engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
  engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  engine.add_tokens([tokenizers.AddedToken(token, special=special) for token in added])
  return engine


def test_special_tokens_are_found_by_name(tmp_path):
  path = tmp_path / "tokenizer.json"
  word_tokenizer({"?": 0, "a": 7}, ["</s>", "[MASK]", "<pad>"]).save(str(path))
  found = read_tokenizer_json(path)
  assert (found.eos_id, found.mask_id, found.pad_id) == (2, 3, 4)
  assert found.vocab_size == 8  # the largest id counts, not the 5 entries
  assert found.byte_lengths is None


@pytest.mark.parametrize("special", [True, False])
def test_text_that_spells_an_added_mask_stays_text(tmp_path, special):
  path = tmp_path / "tokenizer.json"
  word_tokenizer({"?": 0, "a": 1}, ["<|mask|>", "</s>"], special=special).save(str(path))
  assert read_tokenizer_json(path).encode("a <|mask|> a") == [1, 0, 1]


def test_text_that_can_only_be_the_mask_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  word_tokenizer({"?": 0, "a": 1, "[MASK]": 2}).save(str(path))
  found = read_tokenizer_json(path)
  assert found.mask_id == 2
  with pytest.raises(ValueError, match=r"contains '\[MASK\]'"):
    found.encode("a [MASK]")
  with pytest.raises(ValueError, match=r"contains '\[MASK\]'"):
    found.encode_batch(["a", "a [MASK]"])


def test_missing_special_tokens_are_appended(tmp_path):
  path = tmp_path / "tokenizer.json"
  word_tokenizer({"?": 0, "a": 1}).save(str(path))
  found = read_tokenizer_json(path)
  assert sorted([found.eos_id, found.mask_id]) == [2, 3]
  assert found.pad_id == found.eos_id
  assert found.vocab_size == 4
  found.save(tmp_path / "saved")
  assert load_tokenizer(tmp_path / "saved").mask_id == found.mask_id


def test_an_appended_token_never_shares_an_id(tmp_path):
  path = tmp_path / "tokenizer.json"
  word_tokenizer({"?": 0, "a": 2}).save(str(path))
  with pytest.raises(ValueError, match="would get id 2, which is 'a'"):
    read_tokenizer_json(path)


def test_special_tokens_by_request(tmp_path):
  path = tmp_path / "tokenizer.json"
  word_tokenizer({"?": 0}, ["<hide>", "<stop>", "</s>"]).save(str(path))
  found = make_tokenizer(str(path), mask_token="<hide>", eos_token="<stop>")
  assert (found.mask_id, found.eos_id) == (1, 2)
  with pytest.raises(ValueError, match="mask_token '<hidden>' is not in the vocabulary.*<hide>"):
    make_tokenizer(str(path), mask_token="<hidden>")


def test_padding_and_truncation_of_a_file_do_not_act(tmp_path):
  engine = tokenizers.Tokenizer.from_str(BPE.engine.to_str())
  engine.enable_truncation(4)
  engine.enable_padding(length=50)
  engine.save(str(tmp_path / "tokenizer.json"))
  text = "the quick brown fox jumps"
  assert make_tokenizer(str(tmp_path)).encode(text) == BPE.encode(text)


@pytest.mark.parametrize(
  ("spec", "error", "message"),
  [
    ("bpe:many", ValueError, "'bpe:many'"),
    ("nowhere", FileNotFoundError, "'nowhere'.*neither 'bytes' nor"),
  ],
)
def test_bad_names(spec, error, message):
  with pytest.raises(error, match=message):
    make_tokenizer(spec)


def test_bad_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="no tokenizer in"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="is not a tokenizer.json"):
    load_tokenizer(tmp_path)
  (tmp_path / "lladax_tokenizer.json").write_text('{"kind": "runes"}')
  with pytest.raises(ValueError, match="unknown kind of tokenizer 'runes'"):
    load_tokenizer(tmp_path)
  (tmp_path / "lladax_tokenizer.json").write_text("[")
  with pytest.raises(ValueError, match="does not describe a tokenizer"):
    load_tokenizer(tmp_path)
