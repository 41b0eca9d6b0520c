"""Folders damaged at random: a ValueError in plain words, or weights; never half a target."""

import json
import pathlib
import shutil
import struct

import jax
import numpy as np
import pytest
from folders import GOLDENS, IDS, NAMES
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.hub.export import save_folder
from lladax.hub.load import load_folder
from lladax.hub.reader import INDEX_FILE, FolderError, open_folder
from lladax.hub.store import import_to, open_store

QUIET = {"ids": IDS, "progress": False}

JUNK = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 200),
  st.sampled_from([2**31, 2**63, 10**30]),
  st.floats(),
  st.text(max_size=5),
  st.lists(st.integers(0, 3), max_size=3),
  st.dictionaries(st.sampled_from(["type", "rope_type", "rope_theta"]), st.text(max_size=3)),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Each golden in several shards, as (path, tensors by name)."""
  made = {}
  for name in NAMES:
    loaded = load_folder(GOLDENS / name, **QUIET)
    folder = tmp_path_factory.mktemp(name) / "folder"
    save_folder(folder, config=loaded.config, params=loaded.params, max_shard_size=60_000)
    shutil.copy(GOLDENS / name / "config.json", folder)
    made[name] = folder
  return made


def damage_config(data, folder: pathlib.Path):
  path = folder / "config.json"
  config = json.loads(path.read_text())
  for _ in range(data.draw(st.integers(1, 3))):
    key = data.draw(st.sampled_from(sorted(config)))
    if data.draw(st.booleans()):
      config.pop(key)
    else:
      config[key] = data.draw(JUNK)
    if not config:
      break
  path.write_text(json.dumps(config))


def damage_index(data, folder: pathlib.Path):
  path = folder / INDEX_FILE
  index = json.loads(path.read_text())
  names = sorted(index["weight_map"])
  name = data.draw(st.sampled_from(names))
  kind = data.draw(st.sampled_from(["drop", "rename", "file", "junk"]))
  if kind == "drop":
    del index["weight_map"][name]
  elif kind == "rename":
    index["weight_map"][name + "x"] = index["weight_map"].pop(name)
  elif kind == "file":
    index["weight_map"][name] = data.draw(st.text(max_size=8))
  else:
    index["weight_map"] = data.draw(JUNK)
  path.write_text(json.dumps(index))


def damage_header(data, folder: pathlib.Path):
  path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
  content = path.read_bytes()
  (length,) = struct.unpack("<Q", content[:8])
  header = json.loads(content[8 : 8 + length])
  name = data.draw(st.sampled_from(sorted(n for n in header if n != "__metadata__")))
  if data.draw(st.booleans()):
    header[name][data.draw(st.sampled_from(sorted(header[name])))] = data.draw(JUNK)
  else:
    header[data.draw(st.sampled_from([name, name + "x", "__metadata__"]))] = data.draw(JUNK)
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def damage_bytes(data, folder: pathlib.Path):
  path = data.draw(st.sampled_from(sorted(folder.iterdir())))
  content = bytearray(path.read_bytes())
  kind = data.draw(st.sampled_from(["delete", "cut", "add", "change"]))
  if kind == "delete":
    path.unlink()
    return
  at = data.draw(st.integers(0, min(len(content), 400) - 1))
  if kind == "cut":
    content = content[: data.draw(st.sampled_from([at, len(content) - 1 - at]))]
  elif kind == "add":
    content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
  else:
    content[at] ^= data.draw(st.integers(1, 255))
  path.write_bytes(content)


DAMAGES = {
  "config": damage_config,
  "index": damage_index,
  "header": damage_header,
  "bytes": damage_bytes,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_ends_in_words_or_in_weights(kind, folders, tmp_path_factory, data):
  name = data.draw(st.sampled_from(NAMES))
  place = tmp_path_factory.mktemp("damaged")
  folder = shutil.copytree(folders[name], place / "folder")
  DAMAGES[kind](data, folder)
  target = place / "target"
  try:
    import_to(folder, target, **QUIET)
  except ValueError as error:
    assert len(str(error)) > 20 and "\n" not in str(error)
    assert not target.exists()
    # What was begun, if anything, is by the side and is not taken for a model.
    assert {p.name for p in place.iterdir()} <= {"folder", "target.partial"}
    with pytest.raises(FolderError, match="not an imported model"):
      open_store(target)
    with pytest.raises(ValueError):
      load_folder(folder, **QUIET)
    return
  # The damage was none that matters to the weights: all of them are there.
  tensors = open_folder(folder).tensors
  read = sum(x.size for x in jax.tree.leaves(open_store(target).params))
  stored = sum(int(np.prod(t.shape)) for t in tensors.values())
  twice = tensors.get("lm_head.weight")  # tied, and written all the same
  tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
  assert read == stored - (int(np.prod(twice.shape)) if tied and twice else 0)
  assert not (place / "target.partial").exists()
  shutil.rmtree(place)
