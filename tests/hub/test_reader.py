"""Folders read as the safetensors library reads them; each kind of damage has its own message."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from folders import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.hub.reader import INDEX_FILE, SINGLE_FILE, FolderError, open_folder

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tensors_are_those_of_the_library(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("folder")
  shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6))
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  tensors = {
    f"t{i}": rng.normal(size=shape).astype(data.draw(st.sampled_from(DTYPES)))
    for i, shape in enumerate(shapes)
  }
  (folder / "config.json").write_text("{}")
  safetensors.numpy.save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
  opened = open_folder(folder)
  assert opened.tensors.keys() == tensors.keys() and opened.metadata == {"format": "pt"}
  for name, tensor in tensors.items():
    read = opened.read(name)
    assert read.dtype == tensor.dtype and read.shape == tensor.shape
    assert read.tobytes() == tensor.tobytes()
    if tensor.ndim and tensor.shape[0] > 1:
      rows = slice(1, tensor.shape[0])
      assert opened.read(name, rows).tobytes() == tensor[rows].tobytes()


@pytest.fixture
def sharded(tmp_path):
  """A folder of two shards with an index."""
  shards = {
    "model-00001-of-00002.safetensors": {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
    "model-00002-of-00002.safetensors": {"b": np.ones(4, np.float16), "c": np.zeros(2, np.float32)},
  }
  for file, tensors in shards.items():
    safetensors.numpy.save_file(tensors, tmp_path / file)
  weight_map = {name: file for file, tensors in shards.items() for name in tensors}
  (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
  (tmp_path / "config.json").write_text('{"hidden_size": 3}')
  return tmp_path


def test_shards_make_one_checkpoint(sharded):
  folder = open_folder(sharded)
  assert set(folder.tensors) == {"a", "b", "c"} and folder.config == {"hidden_size": 3}
  np.testing.assert_array_equal(folder.read("a"), np.arange(6.0).reshape(2, 3))
  np.testing.assert_array_equal(folder.read("b"), np.ones(4))


SECOND = "model-00002-of-00002.safetensors"


def edit_index(change):
  def damage(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))

  return damage


def edit_header(change):
  """Changes the header of the second shard; its bytes of data stay."""

  def damage(folder):
    content = (folder / SECOND).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SECOND).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

  return damage


def resize(by):
  def damage(folder):
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:by] if by < 0 else content + b"\0" * by)

  return damage


DAMAGES = {
  "no folder": (lambda f: shutil.rmtree(f), "is not a folder"),
  "no config": (lambda f: (f / "config.json").unlink(), "there is no .*config.json"),
  "config is cut off": (lambda f: (f / "config.json").write_text('{"a": '), "is not JSON"),
  "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
  "config says it twice": (lambda f: (f / "config.json").write_text('{"a":1,"a":2}'), "twice"),
  "no index": (lambda f: (f / INDEX_FILE).unlink(), f"2 shards .* but no {INDEX_FILE}"),
  "index without map": (lambda f: (f / INDEX_FILE).write_text("{}"), "no 'weight_map'"),
  "a shard is missing": (lambda f: (f / SECOND).unlink(), "1 are missing: model-00002"),
  "a shard elsewhere": (edit_index(lambda m: m.update(a="../a")), "not a file of this folder"),
  "index with more": (edit_index(lambda m: m.update(d=SECOND)), "in the shard it names: d. In"),
  "index with less": (edit_index(lambda m: m.pop("c")), "but not in the index: c"),
  "truncated": (resize(-1), "is truncated: .* bytes expected"),
  "longer": (resize(3), "longer than its header says"),
  "empty": (lambda f: (f / SECOND).write_bytes(b""), "0 bytes, too few"),
  "truncated in the header": (
    lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:20]),
    "its header needs",
  ),
  "a pointer": (
    lambda f: (f / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid x"),
    "git lfs pull",
  ),
  "another format": (
    lambda f: (f / SECOND).write_bytes(b"\x80\x02}q\x00X\xff\xff" * 9),
    "announces",
  ),
  "header is no JSON": (edit_header(lambda h: b"{nonsense}"), "its header is not JSON"),
  "unknown dtype": (edit_header(lambda h: h["b"].update(dtype="F8_E4M3")), "'F8_E4M3'.*Quantised"),
  "malformed entry": (edit_header(lambda h: h["b"].update(shape=None)), "'b' is malformed"),
  "negative size": (edit_header(lambda h: h["b"].update(shape=[-4])), "'b' is malformed"),
  "size and bytes": (edit_header(lambda h: h["b"].update(shape=[5])), "takes 10 bytes, but"),
  "a gap": (
    edit_header(lambda h: h["c"].update(data_offsets=[100, 108])),
    "begins at byte",
  ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_has_its_message(sharded, kind):
  damage, message = DAMAGES[kind]
  damage(sharded)
  with pytest.raises(FolderError, match=message):
    open_folder(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
  shutil.copy(sharded / SECOND, sharded / "model-00003.safetensors")
  edit_index(lambda m: m.update(d="model-00003.safetensors"))(sharded)
  with pytest.raises(FolderError, match=f"is in {SECOND} and in model-00003"):
    open_folder(sharded)


def test_pickles_are_not_read(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
  with pytest.raises(FolderError, match="pytorch_model.bin may run code when read"):
    open_folder(tmp_path)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path):
  shutil.copytree(GOLDENS / "dream", tmp_path / "folder")
  folder = open_folder(tmp_path / "folder")
  with open(tmp_path / "folder" / SINGLE_FILE, "r+b") as file:
    file.truncate(5000)
  with pytest.raises(FolderError, match="changed since it was opened"):
    folder.read(list(folder.tensors)[-1])
