"""Units of work read every document of a source once, wherever the cuts fall."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.data import units
from lladax.data.units import Reading, find_pieces, group_units, read_unit

TEXTS = ["one", "zwei\nlines", "", "thrée ☃", "4" * 50, "five", "\U0001f40d six"]


def read(source, unit_bytes=1 << 20, reading=None):
  """Texts of every unit of a source."""
  found = group_units(find_pieces(str(source), unit_bytes), unit_bytes)
  return [[d.text for d in read_unit(unit, reading or Reading())] for unit in found]


def flat(lists):
  return [item for inner in lists for item in inner]


def json_lines(texts):
  return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@settings(deadline=None, max_examples=60)
@given(
  st.lists(st.text(max_size=12), min_size=1, max_size=15),
  st.integers(1, 200),
  st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
  st.booleans(),
  st.booleans(),
)
def test_byte_ranges_hold_every_line_once(tmp_path_factory, texts, size, newline, last, escaped):
  path = tmp_path_factory.mktemp("lines") / "c.jsonl"
  lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
  lines = [line.encode("utf-8", "surrogatepass") for line in lines]
  path.write_bytes(newline.join(lines) + newline * last)
  assert flat(read(path, size)) == texts


def test_ranges_are_about_as_large_as_asked(tmp_path):
  path = tmp_path / "c.jsonl"
  path.write_bytes(json_lines(["x" * 90] * 50))
  parts = read(path, 1000)
  assert len(parts) == 6 and flat(parts) == ["x" * 90] * 50
  assert {len(part) for part in parts[:-1]} <= {9, 10}


def test_a_byte_order_mark_is_no_text(tmp_path):
  (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(TEXTS))
  (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfabc")
  assert flat(read(tmp_path / "c.jsonl", 30)) == TEXTS
  assert flat(read(tmp_path / "t.txt")) == ["abc"]


def test_compressed_files(tmp_path):
  gz, zst = tmp_path / "c.jsonl.gz", tmp_path / "c.jsonl.zst"
  gz.write_bytes(gzip.compress(json_lines(TEXTS)))
  with pa.CompressedOutputStream(str(zst), "zstd") as stream:
    stream.write(json_lines(TEXTS))
  text = tmp_path / "t.txt.gz"
  text.write_bytes(gzip.compress("a☃b".encode()))
  assert flat(read(gz, 10)) == flat(read(zst, 10)) == TEXTS
  assert flat(read(text)) == ["a☃b"]
  assert flat(read(tmp_path)) == [*TEXTS, *TEXTS, "a☃b"]  # a folder, by name


@pytest.mark.parametrize("unit_bytes", [1, 200, 1 << 20])
def test_row_groups(tmp_path, unit_bytes):
  path = tmp_path / "c.parquet"
  table = pa.table({"text": TEXTS * 5, "other": range(35)})
  pyarrow.parquet.write_table(table, path, row_group_size=4)
  parts = read(path, unit_bytes)
  assert flat(parts) == TEXTS * 5
  assert len(parts) == {1: 9, 1 << 20: 1}.get(unit_bytes, len(parts))


@pytest.mark.parametrize("unit_bytes", [5_000, 1 << 20])
@pytest.mark.parametrize("records", ["json", "text"])
def test_array_records(tmp_path, unit_bytes, records):
  path = tmp_path / "c.array_record"
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for text in TEXTS * 100:
    writer.write(json.dumps({"text": text}).encode() if records == "json" else text.encode())
  writer.close()
  parts = read(path, unit_bytes, Reading(records=records))
  assert flat(parts) == TEXTS * 100
  assert (len(parts) > 1) == (unit_bytes == 5_000)


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_separators_and_letters_across_blocks(tmp_path, monkeypatch, block):
  monkeypatch.setattr(units, "_BLOCK", block)
  path = tmp_path / "t.txt"
  path.write_text("één<|x|>☃☃<|x|><|x|>last <|", encoding="utf-8")
  texts = flat(read(path, reading=Reading(separator="<|x|>")))
  assert texts == ["één", "☃☃", "", "last <|"]
  assert flat(read(path)) == [path.read_text(encoding="utf-8")]


def test_small_files_share_a_unit(tmp_path):
  for number in range(10):
    (tmp_path / f"{number}.txt").write_text("x" * 100)
  assert [len(part) for part in read(tmp_path, 250)] == [2, 2, 2, 2, 2]


def test_bundled_text():
  assert len(flat(read("shakespeare"))) == 38


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (json_lines(["a"] * 20) + b'{"text": 3}\n', r"c.jsonl:21: field 'text' is int"),
    (json_lines(["a"] * 20) + b'{"body": "x"}\n', r"c.jsonl:21: no field 'text'; it has 'body'"),
    (json_lines(["a"] * 20) + b"[1]\n", r"c.jsonl:21: a JSON object is expected, got list"),
    (json_lines(["a"] * 20) + b"{text\n", r"c.jsonl:21: not JSON"),
    (json_lines(["a"] * 20) + b'{"text": "\xff"}\n', r"c.jsonl:21: not UTF-8"),
  ],
)
@pytest.mark.parametrize("unit_bytes", [40, 1 << 20])
def test_errors_name_the_line_in_any_unit(tmp_path, content, message, unit_bytes):
  path = tmp_path / "c.jsonl"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read(path, unit_bytes)


def test_other_errors(tmp_path):
  (tmp_path / "t.txt").write_bytes(b"abc\xff")
  with pytest.raises(ValueError, match="t.txt is not UTF-8 text: .* near byte 3"):
    read(tmp_path / "t.txt")
  (tmp_path / "c.array_record").write_bytes(b"nothing of the kind")
  with pytest.raises(ValueError, match="not an ArrayRecord file"):
    read(tmp_path / "c.array_record")
  writer = ArrayRecordWriter(str(tmp_path / "d.array_record"), "group_size:1")
  writer.write(b"plain")
  writer.close()
  with pytest.raises(ValueError, match="d.array_record#0: not json.*records=text"):
    read(tmp_path / "d.array_record")
  with pytest.raises(ValueError, match="'json' or 'text', got 'xml'"):
    Reading(records="xml")
  with pytest.raises(FileNotFoundError, match="no file, folder or pattern"):
    read(tmp_path / "absent")
