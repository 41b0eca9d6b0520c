"""Laws of prepared text: elastic, weighted, continued over stages; bad folders refused at once."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from lladax.config import ConfigError, from_json, override, to_json
from lladax.data import load_data
from lladax.data.pipeline import BatchesConfig
from lladax.data.prepare import Recipe, prepare
from lladax.data.prepared import PreparedConfig, Source
from lladax.data.shards import ShardError
from lladax.data.tokenizer import Bytes, make_tokenizer
from lladax.data.transforms import unpack

LENGTH = 32


def prepare_source(folder, name, count, **changes):
  """Documents that begin with the name of their source."""
  random = np.random.default_rng(sum(map(ord, name)))
  letters = list("abcdefghijklmnopqrstuvwxyz")
  texts = [f"{name}{i}:" + "".join(random.choice(letters, random.integers(1, 60)))
           for i in range(count)]  # fmt: skip
  path = folder / f"{name}.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  values = dict(sources=(str(path),), length=LENGTH, heldout=0.1, unit_bytes=1_500)
  prepare(Recipe(**{**values, **changes}), folder / name)
  return str(folder / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  return {name: prepare_source(folder, name, count) for name, count in (("a", 90), ("b", 40))}


def config_of(folders, weights=(3.0, 1.0), **changes):
  sources = tuple(
    Source(path, weight) for path, weight in zip(folders.values(), weights, strict=True)
  )
  values = dict(sources=sources, length=LENGTH, batch_size=8, seed=4, random_length=0.2)
  return PreparedConfig(**{**values, **changes})  # fmt: skip


@pytest.fixture
def config(folders):
  return config_of(folders)


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def join(parts):
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def hosts(data, count, state=None, steps=4):
  """Batches of that many simulated hosts together."""
  parts = []
  for rows in np.split(np.arange(8), count):
    iterator = data.train_iterator(rows=rows)
    if state is not None:
      iterator.set_state(state)
    parts.append(take(iterator, steps))
  return [join(step) for step in zip(*parts, strict=True)]


# --- Elastic ---


@pytest.mark.parametrize("count", [8, 4, 2, 1])
@pytest.mark.parametrize("step", [0, 3, 41])
def test_any_number_of_hosts_sees_the_same_batches_from_any_step(config, count, step):
  whole = take(load_data(config).train_iterator(), step + 4)[step:]
  first = load_data(config).train_iterator(rows=np.array([0, 5]))
  take(first, step)
  state = json.loads(json.dumps(first.get_state()))
  assert_equal(hosts(load_data(config), count, state), whole)


def test_prefetch_changes_nothing(config):
  expected = take(load_data(config).train_iterator(), 6)
  for prefetch in (0, 1, 5):
    data = load_data(dataclasses.replace(config, prefetch=prefetch))
    assert_equal(take(data.train_iterator(), 6), expected)


def test_batches_are_rows_of_the_folders(config):
  data = load_data(dataclasses.replace(config, random_length=0.0))
  stored = {}
  for source, reader in zip(config.sources, data._train_readers, strict=True):
    rows = reader.read(np.arange(len(reader)))
    stored |= {row.tobytes(): source.label for row in rows.tokens}
  batch = next(data.train_iterator())
  names = [stored[row.tobytes()] for row in batch.tokens]
  assert names.count("a") == 6 and names.count("b") == 2
  assert (batch.maskable == (batch.segment_ids > 0)).all()
  starts = np.diff(batch.segment_ids, prepend=0, axis=1) > 0
  assert (batch.positions[starts] == 0).all()


# --- Stages ---


def drawn(data, batches):
  """Rows that were drawn, as their bytes."""
  return [row.tobytes() for batch in batches for row in batch.tokens]


def test_stages_with_other_weights_repeat_and_skip_nothing(folders):
  stages = [((3.0, 1.0), 9), ((1.0, 0.0), 4), ((0.3, 0.7), 13), ((1.0, 1.0), 5)]
  state, seen = None, []
  for weights, steps in stages:
    data = load_data(config_of(folders, weights, random_length=0.0))
    iterator = data.train_iterator()
    if state is not None:
      iterator.continue_after(state)
    batches = take(iterator, steps)
    assert_equal(hosts(data, 4, {**iterator.get_state(), "next_index": 0, "drawn": dict(iterator.start)}
                       if state else None, steps), batches)  # fmt: skip
    seen += drawn(data, batches)
    state = json.loads(json.dumps(iterator.get_state()))
  for index, (part, path) in enumerate(zip(data.mixture.parts, folders.values(), strict=True)):
    alone = load_data(config_of({"x": path}, (1.0,), random_length=0.0))
    own = {row.tobytes() for row in data._train_readers[index].read(np.arange(part.size)).tokens}
    rows = [row for row in seen if row in own]
    assert len(rows) == state["drawn"][part.key] > part.size // 2
    # The order of the source drawn alone: over the stages nothing was repeated or left out.
    expected = drawn(alone, take(alone.train_iterator(), -(-len(rows) // 8)))[: len(rows)]
    assert rows == expected
    assert iterator.epochs()[part.name] == len(rows) / part.size
  assert state["drawn"][data.mixture.parts[0].key] > data.mixture.parts[0].size  # an epoch wrapped


def test_a_stage_without_a_source_remembers_it(folders):
  first = load_data(config_of(folders)).train_iterator()
  take(first, 5)
  middle = load_data(config_of({"a": folders["a"]}, (1.0,))).train_iterator()
  middle.continue_after(first.get_state())
  take(middle, 2)
  last = load_data(config_of(folders)).train_iterator()
  last.continue_after(middle.get_state())
  counts = list(last.get_state()["start"].values())
  assert counts == [30 + 16, 10]


def test_a_state_of_other_weights_is_refused(folders):
  first = load_data(config_of(folders)).train_iterator()
  take(first, 3)
  other = load_data(config_of(folders, (1.0, 1.0))).train_iterator()
  with pytest.raises(ConfigError, match="other sources, weights"):
    other.set_state(first.get_state())
  moved = load_data(config_of({"b": folders["b"], "a": folders["a"]}, (1.0, 3.0)))
  assert moved.fingerprint() != load_data(config_of(folders)).fingerprint()


# --- Held out ---


def test_heldout_rows_of_all_sources_come_once(config):
  data = load_data(config)
  batches = list(data.heldout_iterator())
  assert sum(data.text_bytes(batch) for batch in batches) == data.heldout_bytes > 0
  whole = join(batches)
  assert not whole.segment_ids[data.num_heldout :].any()
  expected = np.concatenate(
    [reader.read(np.arange(len(reader))).tokens for reader in data._heldout_readers]
  )
  assert np.array_equal(whole.tokens[: data.num_heldout], expected)
  parts = [list(data.heldout_iterator(rows=rows)) for rows in np.split(np.arange(8), 2)]
  assert_equal([join(step) for step in zip(*parts, strict=True)], batches)


def test_a_source_of_weight_zero_is_scored_only(folders):
  data = load_data(config_of(folders, (1.0, 0.0)))
  take(iterator := data.train_iterator(), 20)
  assert iterator.epochs()["b"] == 0
  assert data.num_heldout == load_data(config_of(folders)).num_heldout


# --- Configs ---


def test_configs_from_text(config, folders):
  assert from_json(to_json(config)) == config

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Holder:
    data: BatchesConfig = config

  text = f"data.sources=(Source('{folders['a']}', 2.0), Source('{folders['b']}', name='code'))"
  changed = override(Holder(), [text]).data
  assert [source.weight for source in changed.sources] == [2.0, 1.0]
  assert [source.label for source in changed.sources] == ["a", "code"]


# --- What is refused before any batch ---


@pytest.mark.parametrize(
  ("weights", "message"),
  [((1.0, -0.5), "'b': a weight is at least 0, got -0.5"), ((0.0, 0.0), "weights of all sources")],
)
def test_bad_weights(folders, weights, message):
  with pytest.raises(ValueError, match=message):
    config_of(folders, weights)


def test_no_source_and_the_same_one_twice(folders):
  with pytest.raises(ValueError, match="at least one folder"):
    PreparedConfig()
  again = (Source(folders["a"]), Source(folders["a"] + "/", name="other"))
  with pytest.raises(ValueError, match="'a', 'other' have the same content"):
    load_data(PreparedConfig(sources=again, length=LENGTH))


def test_rows_of_another_length(config):
  with pytest.raises(ValueError, match="rows of 32 tokens, and data.length is 64.*--length=64"):
    load_data(dataclasses.replace(config, length=64))


def test_tokenizers_that_differ(folders, config, tmp_path):
  other = prepare_source(tmp_path, "c", 40, tokenizer="bpe:300")
  with pytest.raises(ValueError, match="another tokenizer .*bpe:300.*prepare it again"):
    load_data(config_of({**folders, "c": other}, (1.0, 1.0, 1.0)))
  with pytest.raises(ValueError, match="is not the one that prepared"):
    load_data(config, tokenizer=make_tokenizer("bpe:300", ["some text"]))
  assert isinstance(load_data(config, tokenizer=Bytes()).tokenizer, Bytes)
  with pytest.raises(ValueError, match="id 257, and the vocabulary has 200 ids"):
    load_data(config, vocab_size=200)


def test_folders_that_are_not_ready(config, tmp_path, folders):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    load_data(config_of({"x": tmp_path / "absent"}, (1.0,)))
  with pytest.raises(FileNotFoundError, match="no prepared text in it"):
    load_data(config_of({"x": tmp_path}, (1.0,)))
  (tmp_path / "plan.json").write_text('{"command": "python -m lladax.data prepare --target=x"}')
  with pytest.raises(FileNotFoundError, match="finish it with: python -m lladax.data prepare"):
    load_data(config_of({"x": tmp_path}, (1.0,)))


@pytest.fixture
def one(tmp_path):
  """A folder that may be damaged, and its config."""
  path = prepare_source(tmp_path, "d", 60)
  return tmp_path / "d", PreparedConfig(sources=(Source(path),), length=LENGTH, batch_size=8)


def edit_manifest(folder, edit):
  tree = json.loads((folder / "manifest.json").read_text())
  edit(tree)
  (folder / "manifest.json").write_text(json.dumps(tree))


def test_a_missing_shard_is_named(one):
  folder, config = one
  (folder / "train-000001.array_record").unlink()
  with pytest.raises(ShardError, match=r"shard .*train-000001.array_record is missing"):
    load_data(config)


def test_a_shard_of_another_size_is_named(one):
  folder, config = one
  path = folder / "train-000001.array_record"
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(ShardError, match=r"train-000001.array_record has \d+ bytes, its manifest"):
    load_data(config)


def test_a_shard_with_other_rows_is_named(one):
  folder, config = one
  edit_manifest(folder, lambda tree: tree["train"][1].update(rows=1000))
  with pytest.raises(ShardError, match=r"train-000001.array_record has \d+ rows, .* says 1000"):
    load_data(config)


def test_a_manifest_of_the_future_or_no_manifest(one):
  folder, config = one
  edit_manifest(folder, lambda tree: tree.update(format=99))
  with pytest.raises(ValueError, match="format 99, and this version of lladax reads 1"):
    load_data(config)
  (folder / "manifest.json").write_text("{")
  with pytest.raises(ValueError, match="not a manifest"):
    load_data(config)


def test_a_tokenizer_that_was_changed(one):
  folder, config = one
  make_tokenizer("bpe:300", ["some text"]).save(folder / "tokenizer")
  with pytest.raises(ValueError, match="not the one its rows were made with"):
    load_data(config)


def test_a_damaged_row_is_named_when_it_is_read(one):
  folder, config = one
  data = load_data(config)
  path = folder / "train-000000.array_record"
  content = bytearray(path.read_bytes())
  content[150] ^= 1
  path.write_bytes(content)
  with pytest.raises(ShardError, match=r"train-000000.array_record: row \d+ is damaged"):
    take(data.train_iterator(), 40)


def test_every_document_is_there(one):
  folder, config = one
  data = load_data(config)
  texts = []
  for reader in (*data._train_readers, *data._heldout_readers):
    ids = unpack(reader.read(np.arange(len(reader))), eos_id=256)
    texts += [data.tokenizer.decode(part) for part in ids]
  expected = [json.loads(line)["text"] for line in (folder.parent / "d.jsonl").open()]
  assert sorted(texts) == sorted(expected)
