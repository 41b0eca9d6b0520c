"""A model from wherever it is: a run of ours, a Hugging Face folder or id, an imported store."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import replace

import flax.linen as nn
import jax

from lladax import hub
from lladax.data import Tokenizer, load_tokenizer
from lladax.hub.load import shardings_of, tree_of
from lladax.model import Model
from lladax.models import ModelConfig, abstract_params, init_params
from lladax.sharding import MeshConfig, make_mesh, param_shardings
from lladax.train import CheckpointError, load_params
from lladax.tune import LoraConfig, init_adapters, merge

TOKENIZER_FILES = "tokenizer"  # name of the tokenizer's files within a checkpoint
START_FILE = "start.json"  # what a run began with, in its workdir


def init(config: ModelConfig, seed: int = 0, *, tokenizer: Tokenizer | None = None) -> Model:
  """A model with fresh parameters."""
  params = init_params(config, jax.random.key(seed))
  return Model(config=config, params=params, tokenizer=tokenizer)


def load(
  path: str | os.PathLike,
  *,
  mesh: MeshConfig | jax.sharding.Mesh | None = None,
  dtype: str | None = None,
  ids: Mapping[str, int] | None = None,
  progress: bool = True,
) -> Model:
  """A model by path or hub id.

  Args:
    path: a workdir (its newest whole checkpoint) or one checkpoint in it; a Hugging Face folder,
      or an id like "inclusionAI/LLaDA-MoE-7B-A1B-Instruct", which is downloaded once; a folder that
      `python -m lladax.hub import` wrote.
    mesh: the devices that share the parameters, e.g. `MeshConfig(data=1, expert=8)`; None: the first
      device.
    dtype: of parameters and computation, "float32" or "bfloat16" (router, norms and logits are
      float32 in any case); None: as saved.
    ids: mask_token_id, eos_token_id, pad_token_id, where a Hugging Face folder does not tell.
    progress: show a bar while weights are read.

  Raises:
    lladax.train.CheckpointError: if a workdir has no checkpoint, or none is whole.
    lladax.hub.FolderError: if a folder is damaged, or there is nothing by this name.
    ValueError: for an architecture that lladax does not compute.
  """
  if isinstance(mesh, MeshConfig):
    mesh = make_mesh(mesh)
  folder = pathlib.Path(path)
  if hub.is_store(folder):
    return _from_hub(hub.open_store(folder, mesh=mesh, dtype=dtype), mesh)
  # A workdir has a config.json, too: of the run.
  is_run = (folder / "checkpoints").exists()
  if not folder.exists() or (folder / "config.json").exists() and not is_run:
    loaded = hub.load_folder(path, mesh=mesh, dtype=dtype, ids=ids, progress=progress)
    return _from_hub(loaded, mesh)
  return _from_run(path, mesh, dtype)


def _from_hub(loaded: hub.Loaded, mesh) -> Model:
  config, folder = loaded.config, loaded.source.path
  ids = {name: getattr(config, name) for name in hub.IDS}
  tokenizer = hub.read_folder_tokenizer(folder, ids=ids)
  conversation, stop_ids = None, ()
  if tokenizer is not None:
    default = hub.family_of(loaded.source.config).chat_template
    conversation = hub.Chat(tokenizer, hub.read_chat_template(folder, default=default))
    end = conversation.template.end_of_turn
    # A base model's tokenizer may lack the token that ends a turn: then it just does not chat.
    if end is not None and tokenizer.engine.token_to_id(end) is None:
      conversation = None
    else:
      stop_ids = (conversation.end_of_turn_id,)
  return Model(
    config=config,
    params=loaded.params,
    tokenizer=tokenizer,
    conversation=conversation,
    stop_ids=tuple(i for i in stop_ids if i != config.eos_token_id),
    mesh=mesh,
    source=loaded.source,
  )


def _from_run(path: str | os.PathLike, mesh, dtype: str | None) -> Model:
  def config_of(saved) -> ModelConfig:
    return saved.model if dtype is None else replace(saved.model, dtype=dtype, param_dtype=dtype)

  def abstract(saved):
    return _placed(config_of(saved), mesh, saved.lora)

  loaded = load_params(path, abstract)
  config, files = config_of(loaded.config), loaded.files(TOKENIZER_FILES)
  params, lora = loaded.params, loaded.config.lora
  if lora is not None:
    params = merge(config, lora, _base_of(loaded.path, mesh, config), params)
  tokenizer = load_tokenizer(files)
  conversation = hub.read_chat(files, tokenizer)
  stop_ids = () if conversation is None else (conversation.end_of_turn_id,)
  return Model(
    config=config,
    params=params,
    tokenizer=tokenizer,
    sampler=loaded.config.sampler,
    conversation=conversation,
    stop_ids=tuple(i for i in stop_ids if i != config.eos_token_id),
    mesh=mesh,
  )


def _base_of(checkpoint: pathlib.Path, mesh, config: ModelConfig):
  """The weights that the adapters of a checkpoint are for: those that its run began with."""
  start = json.loads((checkpoint.parent.parent / START_FILE).read_text())
  base = start["checkpoint"] or start["source"]
  if not pathlib.Path(base).exists() and start["checkpoint"]:
    raise CheckpointError(
      f"{checkpoint} has adapters only, and the weights that they are for, {base}, are gone"
    )
  return load(base, mesh=mesh, dtype=config.param_dtype, progress=False).params


def _placed(config: ModelConfig, mesh, lora: LoraConfig | None = None):
  """Shapes, dtypes and shardings of the parameters, or of their adapters."""
  if lora is not None:
    boxed = jax.eval_shape(functools.partial(init_adapters, config, lora), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    plain = nn.meta.unbox(boxed)
    shardings = (
      jax.tree.map(lambda _: here, plain) if mesh is None else param_shardings(mesh, boxed)
    )
    return jax.tree.map(
      lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), plain, shardings
    )
  shardings = tree_of(config, shardings_of(config, mesh))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    abstract_params(config),
    shardings,
  )
