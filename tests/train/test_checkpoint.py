"""Laws of checkpoints: what is restored is what was saved, whole and of the same config."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lladax.config import ConfigError
from lladax.sharding import MeshConfig, make_mesh, use_mesh
from lladax.train.checkpoint import CheckpointError, Checkpoints, describe_arrays, load_params
from lladax.train.state import abstract_state, init_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  width: int = 8
  steps: int = 10
  mesh: MeshConfig = MeshConfig()


class Counter:
  """An iterator whose state is one number."""

  def __init__(self, value=0):
    self.value = value

  def get_state(self):
    return {"value": self.value}

  def set_state(self, state):
    self.value = state["value"]


OPTIMIZER = optax.adamw(1e-2)


def init_params(key, width=8):
  kernel = jax.random.normal(key, (width, 4))
  return {
    "kernel": nn.LogicallyPartitioned(kernel, ("embed", "mlp")),
    "half": jnp.arange(6, dtype=jnp.bfloat16),
  }


@functools.cache
def state_on(mesh_config=None, devices=8, seed=0):
  mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:devices])
  with use_mesh(mesh):
    state = init_state(init_params, OPTIMIZER, seed, mesh)
    return state, abstract_state(init_params, OPTIMIZER, mesh)


def assert_same_bits(a, b):
  assert describe_arrays(a) == describe_arrays(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def at_step(state, step):
  """Another state, told apart by all of its numbers."""
  return jax.tree.map(lambda x: x + step, state)


@pytest.fixture
def saved(tmp_path):
  """Steps 1, 2 and 3 in a directory."""
  state, abstract = state_on()
  counter = Counter()
  files = {"words": lambda directory: (directory / "list.txt").write_text("to be")}
  with Checkpoints(
    tmp_path / "checkpoints",
    config=Settings(),
    iterators={"data": counter},
    files=files,
    keep=3,
  ) as checkpoints:
    for step in (1, 2, 3):
      counter.value = 10 * step
      checkpoints.save(step, at_step(state, step))
  return tmp_path / "checkpoints", state, abstract


def open_again(directory, **options):
  return Checkpoints(
    directory, **{"config": Settings(), "iterators": {"data": Counter()}, "keep": 3, **options}
  )


def test_the_newest_comes_back_bit_by_bit_with_its_iterators(saved):
  directory, state, abstract = saved
  counter = Counter()
  with open_again(directory, iterators={"data": counter}) as checkpoints:
    restored = checkpoints.restore(abstract)
  assert_same_bits(restored, at_step(state, 3))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert counter.value == 30


def test_a_checkpoint_can_be_restored_on_another_mesh(saved):
  directory, state, _ = saved
  _, abstract = state_on(MeshConfig(fsdp=2, tensor=2), devices=4)
  with open_again(directory) as checkpoints:
    restored = checkpoints.restore(abstract)
  jax.tree.map(np.testing.assert_array_equal, restored, at_step(state, 3))
  assert restored.params["kernel"].sharding.mesh.shape["fsdp"] == 2


def test_saving_copies_the_state_so_that_it_may_be_donated_at_once(tmp_path):
  state, abstract = state_on()
  expected = jax.device_get(at_step(state, 1))
  big = jnp.ones((512, 512))
  bump = jax.jit(lambda state, big: (at_step(state, 1), big @ big / 512), donate_argnums=(0, 1))
  with Checkpoints(tmp_path) as checkpoints:
    state = at_step(state, 1)
    checkpoints.save(1, state)
    for _ in range(20):
      state, big = bump(state, big)
    checkpoints.wait()
    restored = checkpoints.restore(abstract)
  jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_an_empty_directory_restores_nothing(tmp_path):
  _, abstract = state_on()
  with Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.restore(abstract) is None
    assert checkpoints.latest_step is None


def test_the_newest_and_every_nth_are_kept(tmp_path):
  state, _ = state_on()
  with Checkpoints(tmp_path, keep=2, keep_every=3) as checkpoints:
    for step in range(1, 9):
      checkpoints.save(step, state)
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 6, 7, 8]


def test_a_step_is_saved_once(saved):
  directory, state, abstract = saved
  with open_again(directory) as checkpoints:
    checkpoints.save(3, at_step(state, 99))
    assert int(checkpoints.restore(abstract).step) == 3


def test_inference_reads_parameters_config_and_files_only(saved):
  directory, state, _ = saved
  shutil.rmtree(directory / "3" / "train")
  expected = at_step(state, 3).params
  for path in (directory.parent, directory, directory / "3"):
    loaded = load_params(path)
    assert loaded.config == Settings() and loaded.path.name == "3"
    assert (loaded.files("words") / "list.txt").read_text() == "to be"
    assert_same_bits(loaded.params, expected)
  assert int(load_params(directory / "1").params["half"][0]) == 1


def test_parameters_can_be_read_in_another_type(saved):
  directory, state, abstract = saved

  def as_bfloat16(config):
    assert config == Settings()
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding),
      abstract.params,
    )

  loaded = load_params(directory, as_bfloat16)
  expected = at_step(state, 3).params["kernel"].astype(jnp.bfloat16)
  np.testing.assert_array_equal(loaded.params["kernel"], expected)


# --- Damage ---


def largest_file(directory: pathlib.Path) -> pathlib.Path:
  return max((path for path in directory.rglob("d/*")), key=lambda path: path.stat().st_size)


def flip_a_bit(directory):
  file = largest_file(directory / "params")
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x10
  file.write_bytes(content)


def truncate(directory):
  # All of them: some are left over from merging and never read.
  for file in (directory / "train").rglob("d/*"):
    file.write_bytes(file.read_bytes()[:20])


DAMAGE = {
  "a changed bit": flip_a_bit,
  "truncated files": truncate,
  "no optimizer": lambda directory: shutil.rmtree(directory / "train"),
  "no small files": lambda directory: shutil.rmtree(directory / "run"),
  "half a config": lambda directory: (directory / "run" / "config.json").write_text('{"class":'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_falls_back_says_so_and_is_kept(saved, damage, caplog):
  directory, state, abstract = saved
  DAMAGE[damage](directory / "3")
  damaged_files = sorted(path.relative_to(directory / "3") for path in (directory / "3").rglob("*"))
  counter = Counter()
  with caplog.at_level(logging.WARNING):
    with open_again(directory, iterators={"data": counter}) as checkpoints:
      restored = checkpoints.restore(abstract)
      assert checkpoints.latest_step == 2
      # The number is free again: the run will come by this step once more.
      checkpoints.save(3, at_step(state, 3))
  assert_same_bits(restored, at_step(state, 2))
  assert counter.value == 20
  assert any(str(directory / "3") in record.getMessage() for record in caplog.records)
  aside = directory / "3.damaged"
  assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == damaged_files
  with open_again(directory) as checkpoints:
    assert_same_bits(checkpoints.restore(abstract), at_step(state, 3))


def test_inference_falls_back_and_renames_nothing(saved, caplog):
  directory, state, _ = saved
  flip_a_bit(directory / "3")
  with caplog.at_level(logging.WARNING):
    loaded = load_params(directory)
  assert loaded.path.name == "2"
  assert_same_bits(loaded.params, at_step(state, 2).params)
  assert {path.name for path in directory.iterdir()} == {"1", "2", "3"}
  with pytest.raises(CheckpointError, match="no checkpoint .* is whole.*checkpoints/3 is damaged"):
    load_params(directory / "3")


def test_when_none_is_whole_the_run_stops_and_nothing_is_touched(saved):
  directory, _, abstract = saved
  for step in "123":
    flip_a_bit(directory / step)
  for _ in range(2):
    with open_again(directory) as checkpoints:
      with pytest.raises(CheckpointError, match="no checkpoint .* is whole") as caught:
        checkpoints.restore(abstract)
    assert all(str(directory / step) in str(caught.value) for step in "123")
    assert {path.name for path in directory.iterdir()} == {"1", "2", "3"}


def test_a_save_that_was_cut_off_is_no_checkpoint(saved, caplog):
  directory, state, abstract = saved
  (directory / "3").rename(directory / "3.orbax-checkpoint-tmp")
  with caplog.at_level(logging.WARNING):
    with open_again(directory) as checkpoints:
      assert_same_bits(checkpoints.restore(abstract), at_step(state, 2))
      checkpoints.save(3, at_step(state, 3))
  assert any("3.orbax-checkpoint-tmp" in record.getMessage() for record in caplog.records)
  assert {path.name for path in directory.iterdir()} == {"1", "2", "3"}


def test_a_missing_path_is_named(tmp_path):
  with pytest.raises(CheckpointError, match="nowhere does not exist"):
    load_params(tmp_path / "nowhere")
  with pytest.raises(CheckpointError, match="no checkpoint in"):
    load_params(tmp_path)


# --- Another program ---


def test_another_config_is_refused_with_the_fields_and_nothing_is_lost(saved):
  directory, _, abstract = saved
  before = sorted(directory.rglob("*"))
  config = Settings(width=9, steps=11)
  with open_again(directory, config=config, may_differ=("steps",)) as checkpoints:
    with pytest.raises(ConfigError, match=r"\(width: 8 -> 9\)"):
      checkpoints.restore(abstract)
  assert sorted(directory.rglob("*")) == before


def test_harmless_fields_may_differ(saved):
  directory, _, abstract = saved
  config = Settings(steps=11, mesh=MeshConfig(fsdp=2))
  with open_again(directory, config=config, may_differ=("steps", "mesh")) as checkpoints:
    assert int(checkpoints.restore(abstract).step) == 3


def test_other_arrays_are_named_and_not_taken_for_damage(saved):
  directory, _, _ = saved
  mesh = make_mesh()
  with use_mesh(mesh):
    abstract = abstract_state(lambda key: init_params(key, width=16), OPTIMIZER, mesh)
  with open_again(directory) as checkpoints:
    with pytest.raises(CheckpointError, match=r"kernel: \[8, 4\] saved, \[16, 4\] expected"):
      checkpoints.restore(abstract)
  assert (directory / "3").exists()


def test_the_checksum_sees_swaps_and_is_blind_to_sharding():
  x = jnp.arange(32.0).reshape(8, 4)
  swapped = x.at[0].set(x[1]).at[1].set(x[0])
  transposed = x.reshape(4, 8)

  def checksum(x):
    return describe_arrays({"x": x})["x"][2]

  assert len({checksum(x), checksum(swapped), checksum(-x), checksum(transposed)}) == 4
  mesh = make_mesh()
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  assert checksum(jax.device_put(x, rows)) == checksum(x)
  json.dumps(describe_arrays({"x": x}))
