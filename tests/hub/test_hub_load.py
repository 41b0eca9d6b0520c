"""Loading: the values that the table gives, each byte read once, on any mesh; and what is refused."""

import json
import shutil
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from folders import GOLDENS, IDS, NAMES, by_path, read

from lladax.hub import plan as plan_lib
from lladax.hub.load import load_folder
from lladax.hub.reader import Folder, FolderError
from lladax.sharding import MeshConfig, make_mesh

MESHES = {
  "one device": None,
  "fsdp 2, expert 4": MeshConfig(data=1, fsdp=2, expert=4),
  "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
}


def load(path, **options):
  return load_folder(path, **{"ids": IDS, "progress": False, **options})


@pytest.fixture
def bytes_read(monkeypatch):
  """Tensor -> how many of its bytes were read."""
  counts: dict[str, int] = {}
  original, lock = Folder.read, threading.Lock()

  def counted(self, name, rows=None):
    tensor = original(self, name, rows)
    with lock:  # parts are read by several threads
      counts[name] = counts.get(name, 0) + tensor.nbytes
    return tensor

  monkeypatch.setattr(Folder, "read", counted)
  return counts


# In many parts on one device, whole on the meshes; the rest is slow.
@pytest.mark.parametrize(
  "mesh, part_bytes",
  [
    pytest.param(
      mesh, size, marks=() if (size == 200) == (mesh == "one device") else pytest.mark.slow
    )
    for mesh in MESHES
    for size in (plan_lib.PART_BYTES, 200)
  ],
)
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_table_and_each_byte_is_read_once(
  name, mesh, part_bytes, bytes_read, monkeypatch
):
  monkeypatch.setattr(plan_lib, "PART_BYTES", part_bytes)
  _, config, tensors, expected, _ = read(name)
  loaded = load(GOLDENS / name, mesh=MESHES[mesh] and make_mesh(MESHES[mesh]))
  assert loaded.config == config
  values = by_path(loaded.params)
  assert values.keys() == expected.keys()
  for path, value in values.items():
    np.testing.assert_array_equal(np.asarray(value), expected[path], err_msg=path)
  assert bytes_read == {name: tensor.nbytes for name, tensor in tensors.items()}


@pytest.fixture
def folder(tmp_path):
  """A copy of a small LLaDA-MoE."""
  shutil.copytree(GOLDENS / "lladamoe_tiny", tmp_path / "folder")
  return tmp_path / "folder"


def rewrite(folder, change):
  """Changes the tensors by name."""
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def set_config(folder, **changes):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | changes))


def to_bfloat16(tensors):
  tensors.update({name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()})


def test_dtype_is_that_of_the_tensors_unless_asked(folder):
  rewrite(folder, to_bfloat16)
  kept, wider = load(folder), load(folder, dtype="float32")
  assert kept.config.dtype == kept.config.param_dtype == "bfloat16"
  for path, value in by_path(wider.params).items():
    np.testing.assert_array_equal(value, by_path(kept.params)[path].astype("float32"))
    own = "norm" in path or path.endswith("router")
    assert by_path(kept.params)[path].dtype == ("float32" if own else "bfloat16")


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


def test_leftovers_on_both_sides_are_named(folder):
  def change(tensors):
    tensors["model.layers.0.mlp.mystery"] = tensors.pop(GATE)

  rewrite(folder, change)
  with pytest.raises(FolderError) as error:
    load(folder)
  assert "without a place: model.layers.0.mlp.mystery" in str(error.value)
  assert f"missing: {GATE}" in str(error.value)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
  rewrite(folder, lambda tensors: tensors.update({GATE: np.zeros((31, 32), np.float32)}))
  with pytest.raises(FolderError, match=r"3.gate_proj.weight: \[31, 32\] in the file, \[32, 32\]"):
    load(folder)


@pytest.mark.parametrize(
  "tensor, message",
  [
    ("model.layers.0.mlp.expert_bias", "expert bias"),
    ("model.layers.0.mlp.shared_expert.gate_proj.weight", "shared expert"),
  ],
)
def test_what_the_config_denies_is_said(folder, tensor, message):
  rewrite(folder, lambda tensors: tensors.update({tensor: np.zeros(8, np.float32)}))
  with pytest.raises(ValueError, match=message):
    load(folder)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"architectures": ["MambaForCausalLM"]},
      "MambaForCausalLM.*no architecture that lladax knows",
    ),
    ({"architectures": ["LLaDAModelLM"]}, "no d_model"),  # a model_type that lies
    ({"model_type": "qwen2"}, "contradict"),
    ({"num_hidden_layers": 3, "moe_layer_freq": [1, 1, 1]}, "missing: model.layers.2"),
    ({"num_hidden_layers": 1, "moe_layer_freq": [1]}, "without a place: model.layers.1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, but there are 69 tensors"),
    ({"vocab_size": 10**30}, "config.json"),
    ({"num_experts": 16}, "experts.8"),
    ({"num_experts": 10**9}, "but there are 69; its number of experts"),
    ({"hidden_size": 64}, "another shape than config.json says"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
  ],
)
def test_a_config_of_another_model_is_refused(folder, changes, message):
  set_config(folder, **changes)
  with pytest.raises(ValueError, match=message):
    load(folder)


def test_a_mesh_that_does_not_divide_is_named():
  with pytest.raises(ValueError, match="2 key heads do not divide .* as 4 heads do"):
    load(GOLDENS / "dream", mesh=make_mesh(MeshConfig(data=2, tensor=4)))


def test_ids_that_nothing_tells_are_asked_for():
  with pytest.raises(ValueError, match="mask_token_id.*pass ids="):
    load(GOLDENS / "lladamoe_tiny", ids=None)


def test_a_hub_id_is_fetched_without_code(monkeypatch):
  huggingface_hub = pytest.importorskip("huggingface_hub")
  asked = {}

  def snapshot_download(name, allow_patterns):
    asked.update(name=name, patterns=allow_patterns)
    return str(GOLDENS / "dream")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  loaded = load("org/Dream-v0")
  assert asked["name"] == "org/Dream-v0" and loaded.source.family == "dream"
  assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["patterns"])


def test_what_the_hub_says_is_passed_on(monkeypatch):
  huggingface_hub = pytest.importorskip("huggingface_hub")

  def snapshot_download(name, allow_patterns):
    raise ConnectionError("no route to host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  with pytest.raises(FolderError, match="org/model.*no route to host.*pass its path"):
    load("org/model")
  with pytest.raises(FolderError, match="'nowhere'.*not a hub id"):
    load("nowhere")


def test_parameters_may_be_donated(folder):
  """On a CPU they lie in memory that NumPy allocated; a step that donates them must be allowed."""
  params = load(folder).params
  before = jax.tree.map(np.array, params)
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old + 1), step(params), before)
