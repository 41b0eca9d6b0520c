"""Laws of prepare: rows are the documents, and neither workers nor kills change a byte."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.data import manifest as manifest_module
from lladax.data import prepare as prepare_module
from lladax.data import shards as shards_module
from lladax.data import units as units_module
from lladax.data import work as work_module
from lladax.data.manifest import read_manifest, read_tokenizer
from lladax.data.packing import BestFit
from lladax.data.prepare import Progress, Recipe, prepare
from lladax.data.shards import ShardError, ShardWriter, decode_row, encode_row, token_type
from lladax.data.tokenizer import Bytes, make_tokenizer
from lladax.data.transforms import unpack
from lladax.data.units import Reading
from lladax.data.verify import describe, open_side, verify
from lladax.data.work import Workers, is_heldout

REPOSITORY = pathlib.Path(__file__).parents[2]


def write_corpus(folder, count=120, seed=0):
  random = np.random.default_rng(seed)
  words = "the quick brown fox jumps over a lazy dög and walks home ☃".split()
  texts = [" ".join(random.choice(words, random.integers(1, 40))) for _ in range(count)]
  texts[10] = texts[3]  # told twice
  lines = [json.dumps({"text": text}) + "\n" for text in texts]
  (folder / "c.jsonl").write_text("".join(lines))
  return texts


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / "source"
  folder.mkdir()
  return folder, write_corpus(folder)


def recipe_of(folder, **changes):
  values = dict(sources=(str(folder / "c.jsonl"),), length=64, heldout=0.2, unit_bytes=2_000)
  return Recipe(**{**values, **changes})


def read_side(folder, side):
  """Texts of a side, in order, and its rows."""
  manifest = read_manifest(folder)
  tokenizer = read_tokenizer(folder, manifest)
  reader = open_side(folder, manifest, side, tokenizer)
  rows = reader.read(np.arange(len(reader)))
  return [tokenizer.decode(ids) for ids in unpack(rows, eos_id=tokenizer.eos_id)], rows


def contents(folder):
  """Every file of a tree, hidden ones too."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("length", [16, 64, 1000])
def test_the_rows_are_the_documents(corpus, tmp_path, tokenizer, length):
  folder, texts = corpus
  prepare(recipe_of(folder, tokenizer=tokenizer, length=length), tmp_path / "out")
  for side, held in (("train", False), ("heldout", True)):
    expected = [text for text in texts if is_heldout(text, 0.2, 0) == held]
    found, rows = read_side(tmp_path / "out", side)
    assert found == expected
    manifest = read_manifest(tmp_path / "out")
    assert manifest.total("documents", side) == len(expected)
    assert manifest.total("text_bytes", side) == sum(len(text.encode()) for text in expected)
    assert manifest.total("tokens", side) == rows.num_tokens
    assert manifest.total("padding", side) == rows.tokens.size - rows.num_tokens
    assert manifest.total("rows", side) == len(rows)
  assert not verify(tmp_path / "out")


@settings(deadline=None, max_examples=25)
@given(
  st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=12),
  st.integers(1, 30),
  st.integers(1, 200),
  st.sampled_from([0.0, 0.5]),
)
def test_any_documents_come_back(tmp_path_factory, texts, length, unit_bytes, heldout):
  folder = tmp_path_factory.mktemp("any")
  (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  if all(is_heldout(text, heldout, 0) for text in texts):
    return
  recipe = recipe_of(folder, length=length, unit_bytes=unit_bytes, heldout=heldout)
  prepare(recipe, folder / "out")
  for side, held in (("train", False), ("heldout", True)):
    found, _ = read_side(folder / "out", side)
    assert found == [text for text in texts if is_heldout(text, heldout, 0) == held]


def test_a_dataset_of_the_hub(corpus, tmp_path, monkeypatch):
  folder, texts = corpus
  table = pa.table({"body": texts, "other": range(len(texts))})

  class Dataset:
    """What `datasets` gives, of a table in memory."""

    column_names, size_in_bytes, _fingerprint = table.column_names, 9_000, "f00"

    def __len__(self):
      return len(table)

    def __getitem__(self, rows):
      return table[rows].to_pydict()

  monkeypatch.setattr(units_module, "load_hub", lambda name: Dataset())
  monkeypatch.setattr(work_module, "load_hub", lambda name: Dataset())
  units_module._hub.cache_clear()
  recipe = Recipe(
    sources=("hf:some/set",), length=64, heldout=0.0, unit_bytes=2_000,
    reading=Reading(text_field="body"),
  )  # fmt: skip
  manifest = prepare(recipe, tmp_path / "out")
  assert len(manifest.train) == 5 and read_side(tmp_path / "out", "train")[0] == texts
  assert manifest.sources[0]["files"] == [
    {"path": "hf:some/set", "rows": len(texts), "fingerprint": "f00"}
  ]
  with pytest.raises(ValueError, match="no field 'text'; it has 'body', 'other'"):
    prepare(dataclasses.replace(recipe, reading=Reading()), tmp_path / "other")
  units_module._hub.cache_clear()


def test_best_fit_rows_hold_whole_documents(corpus, tmp_path):
  folder, texts = corpus
  recipe = recipe_of(folder, length=300, packing=BestFit(), heldout=0.0)
  manifest = prepare(recipe, tmp_path / "out")
  found, _ = read_side(tmp_path / "out", "train")
  assert sorted(found) == sorted(texts)
  assert manifest.total("segments", "train") == manifest.total("documents", "train")


def test_equal_texts_stay_on_one_side_and_the_seed_chooses(corpus):
  _, texts = corpus
  sides = {seed: [is_heldout(text, 0.2, seed) for text in texts] for seed in range(20)}
  assert all(side[3] == side[10] for side in sides.values())
  assert len(set(map(tuple, sides.values()))) == 20
  share = np.mean([*sides.values()])
  assert abs(share - 0.2) < 4 * (0.2 * 0.8 / (20 * len(texts))) ** 0.5
  assert not any(is_heldout(text, 0.0, 0) for text in texts)


def test_the_manifest_tells_what_was_read(corpus, tmp_path):
  folder, _ = corpus
  recipe = recipe_of(folder, tokenizer="bpe:300", tokenizer_sample=1000)
  manifest = prepare(recipe, tmp_path / "out")
  assert manifest == read_manifest(tmp_path / "out")
  (source,) = manifest.sources
  (file,) = source["files"]
  assert file["size"] == (folder / "c.jsonl").stat().st_size
  assert file["sha256"] == shards_module.file_sha256(folder / "c.jsonl")
  assert 1000 <= manifest.tokenizer["trained_on"]["characters"] < 2000
  assert manifest.tokenizer["vocab_size"] == 300
  assert [path.name for path in (tmp_path / "out").glob("*.array_record")]
  assert not {"plan.json", "units"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_key_is_that_of_the_content(corpus, tmp_path):
  folder, _ = corpus
  key = prepare(recipe_of(folder), tmp_path / "a").key
  (tmp_path / "other").mkdir()
  (folder / "c.jsonl").rename(tmp_path / "other" / "c.jsonl")
  moved = recipe_of(tmp_path / "other")
  assert prepare(moved, tmp_path / "b").key == key
  assert prepare(recipe_of(tmp_path / "other", length=32), tmp_path / "c").key != key


# --- Workers and kills ---


def test_three_workers_write_the_bytes_of_one(corpus, tmp_path):
  folder, _ = corpus
  recipe = recipe_of(folder, tokenizer="bpe:300")
  seen = []
  prepare(recipe, tmp_path / "one")
  prepare(recipe, tmp_path / "three", workers=3, show=seen.append)
  assert contents(tmp_path / "one") == contents(tmp_path / "three")
  assert isinstance(seen[-1], Progress) and seen[-1].done == seen[-1].total > 0
  assert seen[-1].tokens == sum(
    read_manifest(tmp_path / "one").total("tokens", side) for side in ("train", "heldout")
  )


@pytest.mark.slow
def test_errors_and_deaths_of_workers(corpus, tmp_path):
  folder, texts = corpus
  path = folder / "c.jsonl"
  path.write_text(path.read_text() + "{broken\n")
  with pytest.raises(ValueError, match=rf"c\.jsonl:{len(texts) + 1}: not JSON"):
    prepare(recipe_of(folder), tmp_path / "out", workers=2)
  with pytest.raises(RuntimeError, match="a worker process was killed"), Workers(2) as pool:
    pool.run(die, [(1,), (2,)], lambda: None)


def die(number, report):
  os.kill(os.getpid(), signal.SIGKILL)


class Killed(BaseException):
  pass


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_file_and_started_again(corpus, tmp_path, monkeypatch, moment):
  folder, _ = corpus
  recipe = recipe_of(folder, tokenizer="bpe:300", unit_bytes=5_000)
  prepare(recipe, tmp_path / "whole")
  expected, replace = contents(tmp_path / "whole"), os.replace
  # A process that is killed clears nothing away.
  monkeypatch.setattr(ShardWriter, "discard", lambda self: None)

  def kill_at(number):
    left = number

    def killing(source, target):
      nonlocal left
      left -= 1
      if left == 0 and moment == "before":
        raise Killed
      replace(source, target)
      if left == 0:
        raise Killed

    return killing

  for number in range(1, 100):
    target = tmp_path / str(number)
    monkeypatch.setattr(os, "replace", kill_at(number))
    try:
      prepare(recipe, target)
      break
    except Killed:
      pass
    monkeypatch.setattr(os, "replace", replace)
    if target.exists():
      (target / ".train-000000.array_record.1").write_bytes(b"of a process that was killed")
    if not (target / "manifest.json").exists() and (target / "plan.json").exists():
      with pytest.raises(FileNotFoundError, match="finish it with: python -m lladax.data prepare"):
        read_manifest(target)
    prepare(recipe, target)
    assert contents(target) == expected, number
  assert 8 < number < 99  # plan, tokenizer, two shards and a record per unit, manifest


def test_units_that_are_finished_are_kept_if_they_are_whole(corpus, tmp_path, monkeypatch):
  folder, _ = corpus
  recipe, target = recipe_of(folder), tmp_path / "out"
  monkeypatch.setattr(Manifest := manifest_module.Manifest, "write", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    prepare(recipe, target)
  monkeypatch.undo()
  assert Manifest
  damaged = target / "train-000001.array_record"
  kept = {path.name: path.stat().st_ino for path in target.glob("*.array_record")}
  content = damaged.read_bytes()
  damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  (target / "heldout-000002.array_record").unlink()
  prepare(recipe, target)
  redone = {name for name, inode in kept.items() if (target / name).stat().st_ino != inode}
  assert redone == {"train-000001.array_record"} | {
    f"{side}-00000{unit}.array_record"
    for unit in (1, 2)
    for side in ("train", "heldout")
    if (target / f"{side}-00000{unit}.array_record").exists()
  }
  prepare(recipe, tmp_path / "other")
  assert contents(target) == contents(tmp_path / "other")


def command(*arguments, **options):
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  return subprocess.Popen(
    [sys.executable, "-m", "lladax.data", *map(str, arguments)],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **options,
  )  # fmt: skip


@pytest.mark.slow
def test_a_command_killed_at_random_moments_ends_the_same(tmp_path):
  folder = tmp_path / "source"
  folder.mkdir()
  write_corpus(folder, count=30_000)
  recipe = recipe_of(folder, tokenizer="bpe:400", unit_bytes=100_000)
  prepare(recipe, tmp_path / "whole")
  flags = recipe.command(tmp_path / "out").split()[4:]
  random, kills = np.random.default_rng(0), 0
  for _ in range(8):
    process = command("prepare", *flags, "--workers=2")
    time.sleep(2 + 4 * random.random())
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.communicate()
  output, _ = (process := command("prepare", *flags, "--workers=2")).communicate()
  assert process.returncode == 0, output
  assert kills and contents(tmp_path / "whole") == contents(tmp_path / "out")


# --- What is refused ---


def test_other_options_and_changed_sources_are_named(corpus, tmp_path):
  folder, _ = corpus
  recipe, target = recipe_of(folder), tmp_path / "out"
  manifest = prepare(recipe, target)
  before = contents(target)
  assert prepare(recipe, target) == manifest  # it is there
  with pytest.raises(ValueError, match="length 64 then, 32 now"):
    prepare(recipe_of(folder, length=32), target)
  write_corpus(folder, seed=1)
  with pytest.raises(ValueError, match=r"sources of .* changed .*c\.jsonl"):
    prepare(recipe, target)
  assert contents(target) == before


def test_a_target_with_something_else_in_it(corpus, tmp_path):
  folder, _ = corpus
  with pytest.raises(ValueError, match="not empty and holds no prepared text"):
    prepare(recipe_of(folder), folder)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="is a file"):
    prepare(recipe_of(folder), tmp_path / "file")
  with pytest.raises(FileNotFoundError, match="does not exist.*prepare --target"):
    read_manifest(tmp_path / "absent")


def test_two_at_a_time(corpus, tmp_path, monkeypatch):
  folder, _ = corpus
  prepare_unit = prepare_module.prepare_unit

  def meanwhile(*arguments, **keywords):
    with pytest.raises(ValueError, match="another process is preparing"):
      prepare(recipe_of(folder), tmp_path / "out")
    return prepare_unit(*arguments, **keywords)

  monkeypatch.setattr(prepare_module, "prepare_unit", meanwhile)
  prepare(recipe_of(folder), tmp_path / "out")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sources": ()}, "no source given"),
    ({"sources": ("a", "a")}, "given twice"),
    ({"length": 0}, "length is at least 1, got 0"),
    ({"heldout": 1.0}, "below 1, got 1.0"),
    ({"split_seed": -1}, "not negative, got -1"),
    ({"tokenizer": "bpe:many"}, "a size is expected"),
  ],
)
def test_bad_recipes(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    recipe_of(tmp_path, **changes)


def test_nothing_is_written_for_bad_input(corpus, tmp_path):
  folder, _ = corpus
  target = tmp_path / "out"
  for changes in ({"sources": ("absent.jsonl",)}, {"tokenizer": "absent.json"}):
    with pytest.raises(FileNotFoundError):
      prepare(recipe_of(folder, **changes), target)
  with pytest.raises(ValueError, match="workers are at least 1"):
    prepare(recipe_of(folder), target, workers=0)
  assert not target.exists()


def test_a_bad_line_and_no_text_are_named(corpus, tmp_path):
  folder, texts = corpus
  path, target = folder / "c.jsonl", tmp_path / "out"
  good = path.read_text()
  path.write_text(good + "{broken\n")
  with pytest.raises(ValueError, match=rf"c\.jsonl:{len(texts) + 1}: not JSON"):
    prepare(recipe_of(folder), target)
  with pytest.raises(ValueError, match="no text to train on"):
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    prepare(recipe_of(folder, sources=(str(folder / "empty.jsonl"),)), tmp_path / "nothing")


def test_the_command_of_a_recipe_is_that_recipe(tmp_path):
  recipe = Recipe(sources=("x y", "z"), packing=BestFit(), reading=Reading(separator="a b"))
  assert recipe.command(tmp_path / "out") == (
    "python -m lladax.data prepare '--source=x y' --source=z "
    f"--target={tmp_path / 'out'} --packing=best_fit '--separator=a b'"
  )


# --- Rows on disk ---


@pytest.mark.parametrize("vocab_size", [258, 2**16, 2**16 + 1, 157_184])
def test_a_row_comes_back(vocab_size):
  dtype = token_type(vocab_size)
  assert dtype.itemsize == (2 if vocab_size <= 2**16 else 4)
  tokens = np.array([0, 5, vocab_size - 1, 7], np.int32)
  ids, lengths = decode_row(encode_row(tokens, [1, 3], dtype), dtype)
  assert ids.tolist() == tokens.tolist() and lengths.tolist() == [1, 3]
  record = encode_row(tokens, [1, 3], dtype)
  for damaged in (b"", record[:-1], record[:9], encode_row(tokens, [1, 2], dtype)):
    with pytest.raises(ValueError):
      decode_row(damaged, dtype)


def test_verify_and_reading_name_shard_and_row(corpus, tmp_path):
  folder, _ = corpus
  target = tmp_path / "out"
  manifest = prepare(recipe_of(folder, unit_bytes=1 << 20), target)
  path = target / manifest.train[0].name
  content = bytearray(path.read_bytes())
  content[200] ^= 4
  path.write_bytes(content)
  problems = verify(target)
  assert any("sha256" in line for line in problems)
  assert any(f"{path}: row " in line for line in problems)
  reader = open_side(target, manifest, "train", Bytes())
  with pytest.raises(ShardError, match=rf"{path.name}: row \d+ is damaged .*verify"):
    reader.read(np.arange(len(reader)))
  path.write_bytes(content[:-70000])
  assert any("bytes, its manifest says" in line for line in verify(target))
  path.unlink()
  assert any("is missing" in line for line in verify(target))
  (target / "tokenizer" / "lladax_tokenizer.json").unlink()
  assert any("no tokenizer" in line for line in verify(target))


def test_verify_sees_rows_that_cannot_be(tmp_path, corpus):
  folder, _ = corpus
  target = tmp_path / "out"
  manifest = prepare(recipe_of(folder, heldout=0.0, unit_bytes=1 << 20), target)
  writer = ShardWriter(target / manifest.train[0].name, length=64, dtype=token_type(258))
  writer.write(np.array([1, 2, 300]), [3])
  writer.write(np.array([1, 257]), [2])
  writer.write(np.arange(65), [65])
  shard = writer.close(documents=3, text_bytes=0)
  tree = json.loads((target / "manifest.json").read_text())
  tree["train"] = manifest_module.shard_tree([shard])
  manifest_module.write_json(target / "manifest.json", tree)
  problems = "\n".join(verify(target))
  assert "row 0: token id 300 in a vocabulary of 258" in problems
  assert "row 1: the text holds MASK" in problems
  assert "row 2: 65 tokens, and rows have 1 to 64" in problems


def test_inspect_shows_counts_and_text(corpus, tmp_path):
  folder, texts = corpus
  prepare(recipe_of(folder), tmp_path / "out")
  lines = "\n".join(describe(tmp_path / "out", rows=2))
  assert "documents" in lines and "c.jsonl" in lines
  first = next(text for text in texts if not is_heldout(text, 0.2, 0))
  assert f"1: '{first[:20]}" in lines


# --- Tokenizers ---


def test_the_tokenizer_of_a_workdir_or_of_another_folder(corpus, tmp_path):
  folder, texts = corpus
  tokenizer = make_tokenizer("bpe:300", texts)
  for step in ("2", "10"):
    (Bytes() if step == "2" else tokenizer).save(
      tmp_path / "run" / "checkpoints" / step / "run" / "tokenizer"
    )
  first = prepare(recipe_of(folder, tokenizer=str(tmp_path / "run")), tmp_path / "a")
  assert first.tokenizer["vocab_size"] == 300  # the newest step
  again = recipe_of(folder, tokenizer=str(tmp_path / "a" / "tokenizer"))
  second = prepare(again, tmp_path / "b")
  assert second.tokenizer["sha256"] == first.tokenizer["sha256"]
  assert second.key == first.key
