"""The flags by which every command opens a model and chooses its sampler."""

from __future__ import annotations

import inspect

from absl import flags

from lladax.config import fields_help, override
from lladax.infer import PUBLISHED, SamplerConfig
from lladax.loading import load
from lladax.model import Model
from lladax.sharding import MeshConfig

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # they are the command's own, so that its --help lists them


def define_flags():
  """Defines them: --model, --dtype, --weights, --mesh, --sampler, --set. Each command does so once."""
  flags.DEFINE_string(
    "model",
    None,
    "Workdir of a run or one of its checkpoints, a Hugging Face folder or id, or a folder that "
    "`python -m lladax.hub import` wrote.",
    required=True,
  )
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. Default: as saved.")
  flags.DEFINE_enum(
    "weights", None, ["int8", "fp8"], "Experts' weights in eight bits. Default: as --dtype."
  )
  flags.DEFINE_multi_string(
    "mesh",
    [],
    "Devices that share the model, as axis=size, e.g. --mesh=data=1 --mesh=expert=8. Default: one. "
    "Axes:\n" + fields_help(MeshConfig()),
  )
  flags.DEFINE_enum(
    "sampler", None, sorted(PUBLISHED), "A published way to decode. Default: the model's own."
  )
  flags.DEFINE_multi_string(
    "set",
    [],
    "Field of the sampler as name=value, e.g. --set gen_length=64 --set temperature=0.7. Fields:\n"
    + fields_help(SamplerConfig()),
  )


def open_model() -> Model:
  """The model that the flags name, with the sampler that they choose, as it was saved.

  Raises:
    ConfigError, ValueError: for what does not exist or does not fit.
  """
  mesh = override(MeshConfig(), FLAGS.mesh) if FLAGS.mesh else None
  model = load(FLAGS.model, mesh=mesh, dtype=FLAGS.dtype)
  sampler = model.sampler if FLAGS.sampler is None else published(FLAGS.sampler, FLAGS.set)
  model.sampler = override(sampler, FLAGS.set)
  return model


def published(name: str, assignments: list[str]) -> SamplerConfig:
  """A published sampler for the lengths that the assignments ask for, with steps to go with them."""
  make = PUBLISHED[name]
  given = {}
  for field, _, text in (assignment.partition("=") for assignment in assignments):
    # What is no length is for `override` to refuse.
    if field.strip() in inspect.signature(make).parameters and text.strip().isdecimal():
      given[field.strip()] = int(text)
  return make(**{field: length for field, length in given.items() if length > 0})
