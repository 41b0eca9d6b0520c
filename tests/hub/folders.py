"""Reading a small folder whole, by the rows of its family; and the config files of the tests."""

import functools
import json
import pathlib

import jax
import numpy as np
import safetensors.numpy

from lladax.hub.families import family_of
from lladax.models import ModelConfig, abstract_params

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = ("lladamoe_tiny", "llada_dense", "llada2_moe", "dream", "qwen2_ar")
FAMILY_OF_GOLDEN = dict(zip(NAMES, ("llada_moe", "llada", "llada2", "dream", "qwen2"), strict=True))
IDS = {"mask_token_id": 125, "eos_token_id": 124, "pad_token_id": 124}


def by_path(tree) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def like(tree, values: dict):
  """`values` by path, in the form of `tree`."""
  return jax.tree.unflatten(jax.tree.structure(tree), [values[path] for path in by_path(tree)])


def import_tensors(family, config, tensors: dict):
  """Parameters by path. Every tensor is used once and every element filled."""
  values = {path: np.full(x.shape, np.nan, x.dtype) for path, x in abstract(config).items()}
  shapes = {path: x.shape for path, x in values.items()}
  used = []
  for row in family.rows(config, tensors):
    expected = row.tensor_shapes(shapes)
    for layer, expert, names in row.names():
      used += names
      arrays = [tensors[name] for name in names]
      assert tuple(x.shape for x in arrays) == expected
      index = tuple(i for i in (layer, expert) if i is not None)
      for path, part in zip(row.params, row.to_params(arrays), strict=True):
        assert values[path][index].shape == part.shape
        values[path][index] = part
  assert sorted(used) == sorted(tensors)
  assert not any(np.isnan(x.astype(np.float32)).any() for x in values.values())
  return values


def export_tensors(family, config, values: dict, names=()):
  """The inverse: tensors by name."""
  tensors = {}
  for row in family.rows(config, names):
    for layer, expert, tensor_names in row.names():
      index = tuple(i for i in (layer, expert) if i is not None)
      arrays = row.to_tensors([values[path][index] for path in row.params])
      for name, array in zip(tensor_names, arrays, strict=True):
        assert name not in tensors
        tensors[name] = array
  return tensors


def abstract(config) -> dict:
  return by_path(abstract_params(config))


@functools.cache
def config_json(name: str) -> dict:
  return json.loads((GOLDENS / name / "config.json").read_text())


@functools.cache
def read(name: str, dtype: str = "float32"):
  """(family, ModelConfig, tensors, parameters by path, golden arrays) of one of `NAMES`."""
  family = family_of(config_json(name))
  config = family.model_config(config_json(name), ids=IDS, dtype=dtype)
  tensors = safetensors.numpy.load_file(GOLDENS / name / "model.safetensors")
  params = import_tensors(family, config, tensors)
  return family, config, tensors, params, dict(np.load(GOLDENS / name / "golden.npz"))


def model_of(config: dict, **changes) -> ModelConfig:
  """The model of a config.json with some keys changed."""
  changed = {**config, **changes}
  return family_of(changed).model_config(changed, ids=IDS, dtype="float32")
