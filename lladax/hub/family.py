"""A family of released models: its config.json and its tensors, both ways."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from lladax.hub import names as names_
from lladax.hub.mapping import Row
from lladax.models import ModelConfig
from lladax.moe import Fsdp

IDS = ("mask_token_id", "eos_token_id", "pad_token_id")
Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(abc.ABC):
  """What is common to the checkpoints of one family.

  Attributes:
    name: of the family, for messages and for `family=` on export.
    architectures: values of `architectures` in config.json; the first is the one we write.
    model_types: values of `model_type`; the first is the one we write.
    marker: a key that every config.json of the family has and none of those it is confused with.
    published_ids: special ids of the released checkpoints, keyed as in `ModelConfig`.
    chat_template: name of the built-in template where a folder has none.
    names: what the tensors are called.
  """

  name: str
  architectures: tuple[str, ...]
  model_types: tuple[str, ...]
  marker: str
  published_ids: Mapping[str, int]
  chat_template: str
  names: names_.Names

  def matches(self, config: Config) -> bool:
    """Whether a config.json is of this family: by architecture, else by model_type and marker.

    LLaDA-MoE and LLaDA both say model_type "llada", so that alone does not decide.
    """
    architectures = given(config, "architectures", [], list)
    if architectures:
      return any(name in self.architectures for name in architectures)
    return config.get("model_type") in self.model_types and self.marker in config

  @abc.abstractmethod
  def model_config(self, config: Config, *, ids: Mapping[str, int], dtype: str) -> ModelConfig:
    """The architecture that a config.json describes.

    Args:
      config: the parsed file.
      ids: `IDS`; the mask may be absent for an autoregressive model.
      dtype: of parameters and activations, "float32" or "bfloat16".

    Raises:
      ValueError: naming the key and its value, if the key is missing, of another type, or asks for
        what this code does not compute.
    """

  @abc.abstractmethod
  def hf_config(self, config: ModelConfig) -> dict[str, Any]:
    """A complete config.json with the keys of the published ones.

    There is no `auto_map` in it: that names files of code, which an export has none of.

    Raises:
      ValueError: if the model has not even the kind of layers that the family has.
    """

  def rows(self, config: ModelConfig, names: Collection[str] = ()) -> tuple[Row, ...]:
    """The table of names.

    Args:
      config: the model.
      names: tensors of the folder, which decide between variants; () gives the published form.

    Raises:
      ValueError: if the folder has an expert bias, a shared expert or biases of the attention that
        the config denies.
    """
    self._check_denied(config, names)
    return tuple(names_.rows(self.names, config, names))

  def _check_denied(self, config: ModelConfig, names: Collection[str]):
    moe = config.moe
    here = self.names
    # What is in the folder, whether the config has it, what to set.
    optional = [
      (here.fused or here.query, ".bias", config.attention_bias, "biases of the attention"),
    ]
    if moe is not None:
      shared = moe.shared_expert_intermediate_size is not None
      optional += [
        (here.expert_bias, "", moe.router.has_bias, "an expert bias"),
        (here.shared + here.gate, ".weight", shared, "a shared expert"),
      ]
    for tensor, ending, expected, what in optional:
      found = sorted(name for name in names if name.endswith(f".{tensor}{ending}"))
      if found and not expected:
        raise ValueError(
          f"the checkpoint has {what} ({found[0]}{' and others' if found[1:] else ''}), but its "
          f"config.json says that there is none; correct the config.json of this {self.name} model"
        )

  def misfit(self, config: ModelConfig) -> str | None:
    """What of a model this family cannot express, or None: what is lost in writing and reading."""
    ids = {name: getattr(config, name) for name in IDS if getattr(config, name) is not None}
    try:
      back = self.model_config(self.hf_config(config), ids=ids, dtype="float32")
    except ValueError as error:
      return str(error)
    ours, theirs = (dataclasses.asdict(architecture(x)) for x in (config, back))
    for field, value in ours.items():
      if field == "moe" and value and theirs[field]:
        lost = [key for key in value if value[key] != theirs[field][key]]
        if lost:
          return f"moe.{lost[0]}={getattr(config.moe, lost[0])!r}"
      elif value != theirs[field]:
        return f"{field}={getattr(config, field)!r}"
    # asdict forgets classes: two routers may have equal fields.
    if config.moe is not None and config.moe.router != back.moe.router:
      return f"moe.router={config.moe.router!r}"
    return None


def architecture(config: ModelConfig) -> ModelConfig:
  """The config with what its weights do not depend on at a default, and defaults written out."""
  moe = config.moe
  if moe is not None:
    moe = dataclasses.replace(moe, exchange=Fsdp(), implementation=None)
  return dataclasses.replace(
    config,
    num_key_value_heads=config.kv_heads,
    head_dim=config.head_size,
    intermediate_size=config.intermediate_size if config.num_dense_layers else None,
    moe=moe,
    dtype="float32",
    param_dtype="float32",
    remat="none",
    scan_unroll=1,
  )


def need(config: Config, key: str, kind: type = int):
  """A key that must be there, as an int or a float.

  Raises:
    ValueError: if it is missing or of another type.
  """
  if config.get(key) is None:
    raise ValueError(f"config.json: {key} is missing; a {_article(kind)} is expected")
  value = config[key]
  fits = isinstance(value, (int, float) if kind is float else kind)
  if isinstance(value, float):
    fits = fits and math.isfinite(value)
  if not fits or (isinstance(value, bool) and kind is not bool):
    raise ValueError(f"config.json: {key} is {value!r}; a {_article(kind)} is expected")
  return kind(value)


def given(config: Config, key: str, default, kind: type = int):
  """Like `need`, but `default` where the key is missing or null."""
  return default if config.get(key) is None else need(config, key, kind)


def _article(kind: type) -> str:
  return {int: "whole number", float: "number", bool: "true or false", list: "list"}[kind]


def check_computed(config: Config, computed: Mapping[str, tuple]):
  """Refuses what this code does not compute.

  Args:
    config: config.json.
    computed: by key, the values that are computed. A missing key or null is taken to be one.

  Raises:
    ValueError: naming the key, its value and the values that are computed.
  """
  for key, values in computed.items():
    value = config.get(key)
    if value is not None and value not in values:
      choices = " or ".join(map(repr, values)) or "nothing but null"
      raise ValueError(f"config.json: {key} is {value!r}; lladax computes {choices} there")


def check_attention(config: Config):
  """Refuses scaled rotary frequencies and sliding windows.

  Raises:
    ValueError: naming the key and its value.
  """
  for key in ("rope_scaling", "rope_parameters"):
    scaling = _inner(config, key)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
      raise ValueError(f"config.json: {key} is {scaling!r}; lladax does not scale rotary angles")
  windows = [x for x in given(config, "layer_types", [], list) if x != "full_attention"]
  if config.get("use_sliding_window") or windows:
    key = "use_sliding_window" if config.get("use_sliding_window") else "layer_types"
    raise ValueError(
      f"config.json: {key} is {config[key]!r}; lladax computes attention over the whole sequence"
    )


def rope_theta(config: Config) -> float:
  """The base of the rotary frequencies; newer files keep it within rope_parameters.

  Raises:
    ValueError: if it is missing, no number, or not positive.
  """
  outside = config.get("rope_theta") is not None
  theta = need(config if outside else _inner(config, "rope_parameters"), "rope_theta", float)
  if theta <= 0:
    raise ValueError(f"config.json: rope_theta is {theta!r}; a positive number is expected")
  return theta


def check_whole_heads(config: Config):
  """Refuses heads of which only a part is rotated.

  Raises:
    ValueError: naming the factor.
  """
  factor = partial_rotary_factor(config)
  if factor not in (None, 1):
    raise ValueError(
      f"config.json: partial_rotary_factor is {factor!r}; whole heads are rotated in this family"
    )


def partial_rotary_factor(config: Config) -> float | None:
  """The fraction of a head that is rotated, from either place; None where it is not said."""
  outside = given(config, "partial_rotary_factor", None, float)
  return given(_inner(config, "rope_parameters"), "partial_rotary_factor", outside, float)


def _inner(config: Config, key: str) -> Config:
  """An object within config.json, empty where it is missing or null."""
  value = config.get(key) or {}
  if not isinstance(value, Mapping):
    raise ValueError(f"config.json: {key} is {value!r}; an object is expected")
  return value


def usual_fields(config: Config, ids: Mapping[str, int], dtype: str) -> dict[str, Any]:
  """Fields of `ModelConfig` from the keys that most published config files share."""
  return {
    "vocab_size": need(config, "vocab_size"),
    "hidden_size": need(config, "hidden_size"),
    "num_hidden_layers": need(config, "num_hidden_layers"),
    "num_attention_heads": need(config, "num_attention_heads"),
    "max_position_embeddings": need(config, "max_position_embeddings"),
    "tie_word_embeddings": given(config, "tie_word_embeddings", False, bool),
    "initializer_range": given(config, "initializer_range", 0.02, float),
    **stored_fields(config, ids, dtype),
  }


def stored_fields(config: Config, ids: Mapping[str, int], dtype: str) -> dict[str, Any]:
  """Fields that every family reads alike."""
  return {
    "rope_theta": rope_theta(config),
    "rms_norm_eps": need(config, "rms_norm_eps", float),
    "dtype": dtype,
    "param_dtype": dtype,
    "mask_token_id": None,
    **ids,
  }


def usual_keys(config: ModelConfig) -> dict[str, Any]:
  """The keys of `usual_fields`, and what stands beside them in the published files."""
  return {
    "attention_dropout": 0.0,
    "eos_token_id": config.eos_token_id,
    "hidden_act": "silu",
    "hidden_size": config.hidden_size,
    "initializer_range": config.initializer_range,
    "max_position_embeddings": config.max_position_embeddings,
    "num_attention_heads": config.num_attention_heads,
    "num_hidden_layers": config.num_hidden_layers,
    "num_key_value_heads": config.kv_heads,
    "pad_token_id": config.pad_token_id,
    "rms_norm_eps": config.rms_norm_eps,
    "rope_scaling": None,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_word_embeddings,
    "torch_dtype": config.param_dtype,
    "vocab_size": config.vocab_size,
  }
