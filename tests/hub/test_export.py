"""Export: the same bytes as were imported, for every family and layout; never half a folder."""

import functools
import json
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from folders import GOLDENS, IDS, NAMES

from lladax.data import Bytes, train_bpe
from lladax.hub import export as export_lib
from lladax.hub.export import ExportError, save_folder
from lladax.hub.families import FAMILIES
from lladax.hub.load import load_folder
from lladax.hub.reader import INDEX_FILE, open_folder
from lladax.models import abstract_params, init_params, tiny
from lladax.moe import MoEConfig
from lladax.sharding import MeshConfig, make_mesh


def load(path, **options):
  return load_folder(path, **{"ids": IDS, "progress": False, **options})


def save_again(loaded, path, **options):
  return save_folder(
    path, config=loaded.config, params=loaded.params, source=loaded.source, **options
  )


def content(folder):
  """Bytes of the weights and JSON of the other files, by name."""
  return {
    file.name: json.loads(file.read_text()) if file.suffix == ".json" else file.read_bytes()
    for file in folder.iterdir()
    if file.suffix in (".json", ".safetensors", ".jinja", ".txt")
  }


def written_folder(path, tensors, config, *, shards=1, **files):
  """A folder as another program writes it, tensors dealt out over shards."""
  path.mkdir()
  (path / "config.json").write_text(json.dumps(config))
  for name, text in files.items():
    (path / name.replace("__", ".")).write_text(text)
  names = [f"part-{i}.safetensors" for i in range(shards)]
  files = dict(zip(tensors, (names[i % shards] for i in range(len(tensors))), strict=True))
  if shards == 1:
    names, files = ["model.safetensors"], dict.fromkeys(tensors, "model.safetensors")
  else:
    total = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / INDEX_FILE).write_text(json.dumps(index))
  for file in names:
    of_file = {name: x for name, x in tensors.items() if files[name] == file}
    safetensors.numpy.save_file(of_file, path / file, metadata={"format": "pt"})
  return path


def golden(name):
  tensors = safetensors.numpy.load_file(GOLDENS / name / "model.safetensors")
  return tensors, json.loads((GOLDENS / name / "config.json").read_text())


@pytest.mark.parametrize(
  "name, mesh",
  [
    *((name, None) for name in NAMES),
    *(
      pytest.param(
        name,
        MeshConfig(data=2, fsdp=2, expert=2),
        marks=() if name == "llada2_moe" else pytest.mark.slow,
      )
      for name in NAMES
    ),
  ],
)
def test_import_then_export_is_byte_identical(name, mesh, tmp_path):
  """Whole files: shards, headers, numbers; with dtypes mixed and side files."""
  tensors, config = golden(name)
  for i, (tensor, x) in enumerate(tensors.items()):
    if i % 5:
      tensors[tensor] = x.astype(ml_dtypes.bfloat16 if i % 5 < 4 else np.float16)
  if config.get("tie_word_embeddings") and "model.embed_tokens.weight" in tensors:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  side = {"generation_config__json": '{"eos_token_id": 124}', "tokenizer__json": '{"a": 1}'}
  before = written_folder(tmp_path / "before", tensors, config, shards=3, **side)
  (before / "modeling.py").write_text("raise SystemExit")
  loaded = load(before, mesh=mesh and make_mesh(mesh), dtype="float32")
  after = save_again(loaded, tmp_path / "after")
  assert content(after) == content(before)
  assert {file.name for file in after.iterdir()} == set(content(before))  # and no code


def test_the_fused_form_of_dinfer_comes_back_as_it_was(tmp_path):
  tensors, config = golden("lladamoe_tiny")
  for n in range(config["num_hidden_layers"]):
    expert = f"model.layers.{n}.mlp.experts."
    gate, up, down = (
      np.stack([tensors.pop(f"{expert}{e}.{p}_proj.weight") for e in range(config["num_experts"])])
      for p in ("gate", "up", "down")
    )
    tensors[f"model.layers.{n}.mlp.w1"] = np.concatenate([gate, up], axis=1)
    tensors[f"model.layers.{n}.mlp.w2"] = down
  before = written_folder(tmp_path / "before", tensors, config)
  fused, plain = load(before), load(GOLDENS / "lladamoe_tiny")
  jax.tree.map(np.testing.assert_array_equal, fused.params, plain.params)
  assert content(save_again(fused, tmp_path / "after")) == content(before)


def small(**changes):
  moe = MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=16)
  sizes = {"hidden_size": 32, "num_hidden_layers": 11, "num_attention_heads": 2}
  sizes["num_key_value_heads"] = 2
  ids = {"mask_token_id": 257, "eos_token_id": 256, "pad_token_id": 256}
  return replace(tiny(vocab_size=258, moe=moe), **{**sizes, **ids, **changes})


@pytest.fixture(scope="module")
def ours():
  """A model of ours: config, parameters."""
  return small(), jax.jit(functools.partial(init_params, small()))(jax.random.key(0))


def test_a_model_of_ours_comes_back_in_shards(ours, tmp_path):
  config, params = ours
  limit = 60_000
  folder = save_folder(tmp_path / "out", config=config, params=params, max_shard_size=limit)
  index = json.loads((folder / INDEX_FILE).read_text())
  shards = {file.name: safetensors.numpy.load_file(file) for file in folder.glob("*.safetensors")}
  assert len(shards) > 3 and set(shards) == set(index["weight_map"].values())
  assert {n: f for f, tensors in shards.items() for n in tensors} == index["weight_map"]
  sizes = [sum(x.nbytes for x in tensors.values()) for tensors in shards.values()]
  assert max(sizes) <= limit and sum(sizes) == index["metadata"]["total_size"]
  # Layer by layer, the second before the tenth.
  order = [n for file in sorted(shards) for n in open_folder(folder).tensors if n in shards[file]]
  layers = [int(name.split(".")[2]) for name in order if name.startswith("model.layers.")]
  assert layers == sorted(layers)
  again = load_folder(folder, progress=False)
  assert again.config == config
  jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_rounds_the_weights_and_is_written_down(ours, dtype, tmp_path):
  config, params = ours
  folder = save_folder(tmp_path / "out", config=config, params=params, dtype=dtype)
  assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  assert {x.dtype.name for x in tensors.values()} == {dtype}
  rounded = np.asarray(params["embed"]["embedding"]).astype(dtype)
  np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], rounded)
  source = load(GOLDENS / "dream")
  other = open_folder(save_again(source, tmp_path / "other", dtype=dtype))
  assert other.config["torch_dtype"] == dtype
  assert {x.dtype for x in other.tensors.values()} == {
    {"bfloat16": "BF16", "float16": "F16"}[dtype]
  }


@pytest.mark.parametrize("tokenizer", [Bytes(), train_bpe(["to be or not to be"], 270)])
def test_tokenizer_and_generation_settings_are_written(ours, tokenizer, tmp_path):
  import tokenizers

  config, params = ours
  folder = save_folder(tmp_path / "out", config=config, params=params, tokenizer=tokenizer)
  engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  assert engine.encode("not to be").ids == tokenizer.encode("not to be")
  settings = json.loads((folder / "generation_config.json").read_text())
  assert settings == {"eos_token_id": 256, "pad_token_id": 256}
  assert json.loads((folder / "tokenizer_config.json").read_text())["mask_token"] == "<|mask|>"


def test_the_card_tells_the_config(ours, tmp_path):
  config, params = ours
  card = (save_folder(tmp_path / "out", config=config, params=params) / "README.md").read_text()
  total = sum(x.size for x in jax.tree.leaves(params))
  assert f"| parameters | {total:,} |" in card and "| experts | 4, of which 2 per token |" in card
  written = json.loads(card.split("```json\n")[1].split("```")[0])
  assert written["hidden_size"] == config.hidden_size
  own = save_folder(tmp_path / "own", config=config, params=params, card="# Mine\n")
  assert (own / "README.md").read_text() == "# Mine\n"


# --- What is refused, and what is left of it ---


def test_an_existing_folder_is_not_touched(ours, tmp_path):
  (tmp_path / "out").mkdir()
  with pytest.raises(ExportError, match="out exists; choose another name"):
    save_folder(tmp_path / "out", config=ours[0], params=ours[1])
  assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["shape", "missing", "dtype", "source", "no family", "shard size"])
def test_what_does_not_fit_is_refused_and_leaves_nothing(ours, kind, tmp_path):
  config, params = ours
  options, error, message = {}, ExportError, kind
  if kind == "shape":
    config = small(vocab_size=300)
    message = r"embed/embedding: \[258, 32\], \[300, 32\] by the config"
  elif kind == "missing":
    params = {name: x for name, x in params.items() if name != "final_norm"}
    message = "final_norm/scale: none"
  elif kind == "dtype":
    options, message = {"dtype": "int8"}, "'int8': expected one of float32"
  elif kind == "source":
    options, message = {"source": load(GOLDENS / "lladamoe_tiny").source}, "not the one read from"
  elif kind == "no family":
    config, error = small(causal=True), ValueError
    message = "no released family"
  else:
    options, error = {"max_shard_size": 0}, ValueError
    message = "max_shard_size"
  with pytest.raises(error, match=message):
    save_folder(tmp_path / "out", config=config, params=params, **options)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", [0, 1, 30])
def test_a_write_that_fails_leaves_nothing(ours, when, tmp_path, monkeypatch):
  writes = []

  def write(file, array):
    if len(writes) == when:
      raise OSError("no space left on device")
    writes.append(file.write(array))

  monkeypatch.setattr(export_lib, "_write_all", write)
  with pytest.raises(OSError, match="no space"):
    save_folder(tmp_path / "out", config=ours[0], params=ours[1])
  assert len(writes) == when and not list(tmp_path.iterdir())


def test_every_family_is_covered():
  families = {load(GOLDENS / name).source.family for name in NAMES}
  assert families == {family.name for family in FAMILIES}


def test_a_source_that_is_gone_costs_only_its_side_files(tmp_path):
  shutil.copytree(GOLDENS / "dream", tmp_path / "before")
  loaded = load(tmp_path / "before")
  shutil.rmtree(tmp_path / "before")
  after = save_again(loaded, tmp_path / "after")
  want = (GOLDENS / "dream" / "model.safetensors").read_bytes()
  assert (after / "model.safetensors").read_bytes() == want


def test_numpy_parameters_are_as_good(ours, tmp_path):
  config, params = ours
  assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))
  a = save_folder(tmp_path / "a", config=config, params=params)
  b = save_folder(tmp_path / "b", config=config, params=jax.tree.map(np.asarray, params))
  assert content(a) == content(b)
