"""The import on disk: what loading gives, resumable wherever it is stopped, damage noticed."""

import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from folders import GOLDENS, IDS, NAMES, by_path
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lladax.hub import store as store_lib
from lladax.hub.export import save_folder
from lladax.hub.load import load_folder
from lladax.hub.reader import FolderError
from lladax.hub.store import import_to, is_store, open_store
from lladax.sharding import MeshConfig, make_mesh

SOURCE = GOLDENS / "llada2_moe"
QUIET = {"ids": IDS, "progress": False}


class Stopped(BaseException):
  """As abrupt as can be simulated: nothing of the program's catches it."""


def assert_equal(loaded, expected):
  assert loaded.config == expected.config
  assert jax.tree.structure(loaded.params) == jax.tree.structure(expected.params)
  for path, value in by_path(loaded.params).items():
    want = by_path(expected.params)[path]
    assert value.dtype == want.dtype and value.sharding == want.sharding, path
    np.testing.assert_array_equal(value, want, err_msg=path)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, expert=2)])
@pytest.mark.parametrize("name", NAMES)
def test_a_store_gives_what_the_folder_gives_and_exports_the_same(name, mesh, tmp_path):
  target = import_to(GOLDENS / name, tmp_path / "store", **QUIET)
  assert is_store(target) and not is_store(GOLDENS / name)
  mesh = mesh and make_mesh(mesh)
  stored = open_store(target, mesh=mesh)
  assert_equal(stored, load_folder(GOLDENS / name, mesh=mesh, **QUIET))
  out = save_folder(
    tmp_path / "out", config=stored.config, params=stored.params, source=stored.source
  )
  want = (GOLDENS / name / "model.safetensors").read_bytes()
  assert (out / "model.safetensors").read_bytes() == want
  assert json.loads((out / "config.json").read_text()) == dict(stored.source.config)


def test_orbax_restores_the_parameters_without_us(tmp_path):
  target = import_to(SOURCE, tmp_path / "store", dtype="bfloat16", **QUIET)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
  sharded = open_store(target, mesh=mesh)
  restore = ocp.PyTreeCheckpointer().restore
  plain = by_path(restore(target / "params"))
  args = ocp.checkpoint_utils.construct_restore_args(sharded.params)
  placed = by_path(restore(target / "params", restore_args=args))
  for path, want in by_path(sharded.params).items():
    assert plain[path].dtype == want.dtype and placed[path].sharding == want.sharding
    np.testing.assert_array_equal(plain[path], want)
    np.testing.assert_array_equal(placed[path], want)
  assert plain.keys() == placed.keys() == by_path(sharded.params).keys()


def test_dtype_of_import_and_of_opening(tmp_path):
  target = import_to(SOURCE, tmp_path / "store", dtype="bfloat16", **QUIET)
  assert_equal(open_store(target), load_folder(SOURCE, dtype="bfloat16", **QUIET))
  wide = open_store(target, dtype="float32")
  assert wide.config.dtype == "float32"
  assert wide.params["embed"]["embedding"].dtype == "float32"


def test_tokenizer_files_come_along(tmp_path):
  shutil.copytree(SOURCE, tmp_path / "folder")
  (tmp_path / "folder" / "tokenizer.json").write_text("{}")
  (tmp_path / "folder" / "modeling.py").write_text("raise SystemExit")
  target = import_to(tmp_path / "folder", tmp_path / "store", **QUIET)
  assert {f.name for f in (target / "source").iterdir()} == {"config.json", "tokenizer.json"}


def import_until(target, writes: int) -> int:
  """Imports and stops in the middle of the write number `writes`; how many there were."""
  original, count = store_lib._write, 0

  def write(array, region, buffer):
    nonlocal count
    if count == writes:
      half = (region[0], *((a, (a + b) // 2) for a, b in region[1:])) if len(region) > 1 else region
      original(array, half, buffer[tuple(slice(0, b - a) for a, b in half)])
      raise Stopped
    count += 1
    original(array, region, buffer)

  store_lib._write = write
  try:
    import_to(SOURCE, target, **QUIET)
  except Stopped:
    assert not target.exists()
  finally:
    store_lib._write = original
  return count


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(stops=st.lists(st.integers(0, 12), min_size=1, max_size=4))
@example(stops=[8, 11, 10, 0])  # done before the last stop
def test_stopped_anywhere_it_goes_on_and_ends_with_the_same(stops, tmp_path_factory):
  target = tmp_path_factory.mktemp("import") / "store"
  done = 0
  for stop in stops:
    if not target.exists():  # the earlier parts together may be all there is
      done += import_until(target, stop)
  remaining = import_until(target, 10**9) if not target.exists() else 0
  whole = import_until(tmp_path_factory.mktemp("import") / "store", 10**9)
  # Nothing that was whole is written again, but the group that was being written.
  assert done + remaining <= whole + 2 * len(stops)
  assert_equal(open_store(target), load_folder(SOURCE, **QUIET))
  assert {path.name for path in target.parent.iterdir()} == {"store"}


def test_a_line_that_was_cut_off_does_not_count(tmp_path):
  import_until(tmp_path / "store", 3)
  log = tmp_path / "store.partial" / "done"
  lines = log.read_text().splitlines(keepends=True)
  log.write_text("".join(lines[:-1]) + lines[-1].rstrip("\n"))
  target = import_to(SOURCE, tmp_path / "store", **QUIET)
  assert_equal(open_store(target), load_folder(SOURCE, **QUIET))


@pytest.mark.parametrize("when", ["before it began", "before its name"])
def test_stopped_between_the_steps_it_goes_on(when, tmp_path, monkeypatch):
  def rename(path, target):
    if path.is_dir() or when == "before it began":
      raise Stopped
    os.rename(path, target)

  with monkeypatch.context() as patch:
    patch.setattr(store_lib.pathlib.Path, "rename", rename)
    with pytest.raises(Stopped):
      import_to(SOURCE, tmp_path / "store", **QUIET)
  assert not (tmp_path / "store").exists()
  target = import_to(SOURCE, tmp_path / "store", **QUIET)
  assert_equal(open_store(target), load_folder(SOURCE, **QUIET))
  assert {path.name for path in target.iterdir()} == {"manifest.json", "params", "source"}


@pytest.mark.parametrize(
  "other", [(GOLDENS / "dream", {}), (SOURCE, {"dtype": "bfloat16"})], ids=["source", "dtype"]
)
def test_what_was_begun_differently_is_not_mixed(other, tmp_path):
  import_until(tmp_path / "store", 2)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(FolderError, match="store.partial was begun from .*llada2_moe.*remove it"):
    import_to(other[0], tmp_path / "store", **QUIET, **other[1])
  assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_target_is_not_touched(tmp_path):
  (tmp_path / "store").write_text("mine")
  with pytest.raises(FolderError, match="store exists"):
    import_to(SOURCE, tmp_path / "store", **QUIET)
  assert (tmp_path / "store").read_text() == "mine"


def test_an_import_that_is_not_finished_is_not_opened(tmp_path):
  import_until(tmp_path / "store", 2)
  with pytest.raises(FolderError, match="was begun: run the same import again"):
    open_store(tmp_path / "store")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  return import_to(SOURCE, tmp_path_factory.mktemp("import") / "store", **QUIET)


@pytest.mark.parametrize("damage", ["a bit", "shorter", "missing"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, expert=4)])
def test_a_damaged_chunk_is_noticed_and_named(imported, damage, mesh, tmp_path):
  store = shutil.copytree(imported, tmp_path / "store")
  chunk = store / "params" / "layers.moe.gate_up" / "c" / "0" / "0" / "0" / "0"
  content = bytearray(chunk.read_bytes())
  content[len(content) // 2] ^= 1
  if damage == "missing":
    chunk.unlink()
  else:
    chunk.write_bytes(content if damage == "a bit" else content[:-10])
  with pytest.raises(FolderError, match="parameter layers/moe/gate_up is damaged .*import again"):
    open_store(store, mesh=mesh and make_mesh(mesh))


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', '{"format": 1, "config": {}}'])
def test_a_damaged_manifest_is_named(imported, text, tmp_path):
  store = shutil.copytree(imported, tmp_path / "store")
  (store / "manifest.json").write_text(text)
  with pytest.raises(FolderError, match="manifest.json is not readable"):
    open_store(store)
