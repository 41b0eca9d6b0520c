"""Special ids: who counts before whom, and errors that say what to pass."""

import itertools
import json

import pytest
import tokenizers
from tokenizers import models

from lladax.hub.ids import added_tokens, end_of_turn_id, settle_ids
from lladax.hub.reader import FolderError

PUBLISHED = {"mask_token_id": 95, "eos_token_id": 92, "pad_token_id": 92}
VOCABULARY = {"vocab_size": 100}
MASKS = {"asked": 7, "config": 8, "tokenizer": 9, "family": 95}


def write(folder, name, value):
  (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def folder_with(folder, tokens, named=()):
  added = [{"id": i, "content": token, "special": True} for token, i in tokens.items()]
  write(folder, "tokenizer.json", {"added_tokens": added})
  write(folder, "tokenizer_config.json", dict(named))
  return folder


@pytest.mark.parametrize("size", range(5))
def test_the_first_who_knows_decides(tmp_path, size):
  """Over all subsets of the sources: the mask is that of the first one of the subset."""
  for sources in itertools.combinations(MASKS, size):
    if "tokenizer" in sources:
      folder_with(tmp_path, {"<|mask|>": MASKS["tokenizer"]})
    else:
      folder_with(tmp_path, {})
    config = {"mask_token_id": MASKS["config"]} if "config" in sources else {}
    arguments = {
      "published": PUBLISHED if "family" in sources else {},
      "asked": {"mask_token_id": MASKS["asked"]} if "asked" in sources else None,
    }
    ends = {"eos_token_id": 1, "pad_token_id": 2}
    if sources:
      settled = settle_ids(tmp_path, VOCABULARY | ends | config, **arguments)
      assert settled == {"mask_token_id": MASKS[sources[0]], **ends}
    else:
      with pytest.raises(ValueError, match=r"mask_token_id.*--mask_id"):
        settle_ids(tmp_path, VOCABULARY | ends, **arguments)


def test_published_ids_count_only_within_the_vocabulary(tmp_path):
  with pytest.raises(ValueError, match="outside this vocabulary of 95"):
    settle_ids(tmp_path, {"vocab_size": 95}, published=PUBLISHED)
  assert settle_ids(tmp_path, {"vocab_size": 96}, published=PUBLISHED) == PUBLISHED


def test_padding_falls_back_on_end_of_text(tmp_path):
  config = VOCABULARY | {"mask_token_id": 3, "eos_token_id": [4, 5]}
  assert settle_ids(tmp_path, config, published={})["pad_token_id"] == 4


def test_the_rows_of_the_embedding_bound_the_ids(tmp_path):
  """LLaDA-8B has an embedding_size beside vocab_size; ids may lie between."""
  config = {"vocab_size": 90, "embedding_size": 96}
  assert settle_ids(tmp_path, config, published=PUBLISHED) == PUBLISHED


def test_an_autoregressive_model_needs_no_mask(tmp_path):
  settled = settle_ids(tmp_path, VOCABULARY | {"eos_token_id": 1}, published={}, needs_mask=False)
  assert settled == {"mask_token_id": None, "eos_token_id": 1, "pad_token_id": 1}


def test_names_of_tokens_in_all_the_files(tmp_path):
  write(tmp_path, "added_tokens.json", {"<a>": 10, "<b>": 11})
  decoder = {"12": {"content": "<b>"}, "13": {"content": "<c>"}}
  write(tmp_path, "tokenizer_config.json", {
    "added_tokens_decoder": decoder, "mask_token": {"content": "<a>"}, "eos_token": "<c>",
  })  # fmt: skip
  write(tmp_path, "special_tokens_map.json", {"pad_token": "<b>", "eos_token": "<a>"})
  assert added_tokens(tmp_path) == {"<a>": 10, "<b>": 12, "<c>": 13}
  settled = settle_ids(tmp_path, VOCABULARY, published=PUBLISHED)
  assert settled == {"mask_token_id": 10, "eos_token_id": 13, "pad_token_id": 12}
  write(tmp_path, "tokenizer.json", {"added_tokens": [{"id": 14, "content": "<c>"}]})
  assert added_tokens(tmp_path)["<c>"] == 14  # it is what encodes


@pytest.mark.parametrize("value", [-1, 100, "5", True, 5.0])
def test_an_id_that_is_none_is_refused(tmp_path, value):
  with pytest.raises(ValueError, match=rf"mask_token_id is {value!r} by config.json"):
    settle_ids(tmp_path, VOCABULARY | {"mask_token_id": value}, published=PUBLISHED)


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_the_mask_is_no_text(tmp_path, key):
  with pytest.raises(ValueError, match=f"mask_token_id and {key} are both 95"):
    settle_ids(tmp_path, VOCABULARY, published=PUBLISHED, asked={key: 95})


def test_a_misspelt_key_is_named(tmp_path):
  with pytest.raises(ValueError, match="'mask_id'; known: mask_token_id"):
    settle_ids(tmp_path, VOCABULARY, published=PUBLISHED, asked={"mask_id": 3})


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("tokenizer.json", "{", "not JSON"),
    ("tokenizer.json", "[]", "not a JSON object"),
    ("tokenizer.json", '{"added_tokens": [{"id": 3}]}', "added token without content"),
    ("tokenizer.json", '{"added_tokens": [{"content": "<x>", "id": "3"}]}', "the id '3'"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "<x>"}}', "malformed at 'x'"),
    ("added_tokens.json", '{"<x>": null}', "the id None"),
  ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
  write(tmp_path, name, content)
  with pytest.raises(FolderError, match=message) as raised:
    settle_ids(tmp_path, VOCABULARY, published=PUBLISHED)
  assert name in str(raised.value)


def test_the_end_of_a_turn_is_read_and_is_not_the_mask():
  engine = tokenizers.Tokenizer(models.BPE())
  engine.add_special_tokens(["<|role_end|>", "<|mask|>"])
  role_end, mask = map(engine.token_to_id, ("<|role_end|>", "<|mask|>"))
  assert end_of_turn_id(engine, "<|role_end|>", mask_id=mask) == role_end
  # Ling 2.0's tokenizer with LLaDA-MoE's weights.
  with pytest.raises(ValueError, match=f"id {role_end} .* the mask of the model"):
    end_of_turn_id(engine, "<|role_end|>", mask_id=role_end)
  with pytest.raises(ValueError, match="'<|eot_id|>', which is no token"):
    end_of_turn_id(engine, "<|eot_id|>", mask_id=mask)
