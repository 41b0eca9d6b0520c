"""Where a run begins if not from nothing: another run, the stage before it, or released weights."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from etils import epath

from lladax import hub
from lladax.config import ConfigError
from lladax.data import Tokenizer, load_tokenizer
from lladax.hub.load import plan_import
from lladax.loading import START_FILE
from lladax.models import ModelConfig, abstract_params
from lladax.train import CheckpointError, TrainState, evaluated, load_params, state_from
from lladax.train.checkpoint import read_iterators, read_train_state, saved_steps


class Choice(abc.ABC):
  """Which checkpoint of a run. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def choose(self, workdir: epath.Path, steps: Sequence[int]) -> int:
    """One of the steps, which ascend and are not empty.

    Raises:
      ConfigError: if it cannot be told which.
    """


@dataclasses.dataclass(frozen=True)
class Latest(Choice):
  """The newest."""

  def choose(self, workdir, steps):
    del workdir
    return steps[-1]


@dataclasses.dataclass(frozen=True)
class AtStep(Choice):
  """That of a step."""

  step: int

  def choose(self, workdir, steps):
    if self.step not in steps:
      raise ConfigError(f"{workdir} has no checkpoint of step {self.step}, but of {_listed(steps)}")
    return self.step


@dataclasses.dataclass(frozen=True)
class Best(Choice):
  """The one whose evaluation was best, by the run's records (`metrics.jsonl`).

  Attributes:
    metric: its name there. Evaluations count that were made at a step that was saved.
    highest: whether more is better.
  """

  metric: str = "heldout/nll"
  highest: bool = False

  def find(self, workdir, steps: Sequence[int]) -> int | None:
    """As `choose`, None if no step was evaluated; of equals the latest."""
    values = evaluated(workdir, steps, self.metric)
    sign = 1 if self.highest else -1
    return max(values, key=lambda step: (sign * values[step], step), default=None)

  def choose(self, workdir, steps):
    best = self.find(workdir, steps)
    if best is None:
      raise ConfigError(
        f"none of the checkpoints of {workdir} (steps {_listed(steps)}) was evaluated: no record of "
        f"these steps in metrics.jsonl has {self.metric!r}. Choose one with AtStep(step), or make "
        "eval_every a multiple of save_every"
      )
    return best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """The parameters that a run begins with, and what else it takes over.

  The new run has steps, noise and a learning rate schedule of its own, all from their beginning.

  Attributes:
    path: a workdir, a Hugging Face folder or id, or what `python -m lladax.hub import` wrote.
    stage: instead of `path`: the workdir of this name beside this run's own.
    checkpoint: which of a workdir.
    optimizer: "keep" the moments of a workdir's optimizer, or "reset" them.
    data: "continue" after the rows that were seen, source by source, or "restart".

  Raises:
    ValueError: for both or neither of path and stage, or a word that is not one of these.
  """

  path: str | None = None
  stage: str | None = None
  checkpoint: Choice = Latest()
  optimizer: str = "reset"
  data: str = "continue"

  def __post_init__(self):
    if (self.path is None) == (self.stage is None):
      raise ValueError(f"a start has either a path or a stage; got {self.path=}, {self.stage=}")
    for name, words in (("optimizer", ("keep", "reset")), ("data", ("continue", "restart"))):
      if getattr(self, name) not in words:
        raise ValueError(f"start.{name} is one of {words}; got {getattr(self, name)!r}")

  def source(self, workdir: str | os.PathLike) -> epath.Path:
    """The path, of a stage too."""
    return epath.Path(self.path) if self.stage is None else epath.Path(workdir).parent / self.stage


class Origin(NamedTuple):
  """Where a start leads, found before anything is read.

  Attributes:
    checkpoint: directory of one checkpoint; None for weights that no run of ours made.
    source: the path of the start.
  """

  checkpoint: epath.Path | None
  source: epath.Path


def find_origin(start: Start, workdir: epath.Path, model: ModelConfig) -> Origin:
  """What a run in `workdir` begins from; the same checkpoint again after a restart.

  Raises:
    ConfigError: if there is none, or not the one that is asked for.
    FolderError: if a path leads nowhere, or to a folder that is damaged.
  """
  source = start.source(workdir)
  if (workdir / START_FILE).exists():
    saved = json.loads((workdir / START_FILE).read_text())
    if saved["checkpoint"] is not None and not epath.Path(saved["checkpoint"]).exists():
      raise ConfigError(
        f"this run began from {saved['checkpoint']}, which is gone; bring it back, or choose "
        "another workdir"
      )
    checkpoint = saved["checkpoint"]
    return Origin(None if checkpoint is None else epath.Path(checkpoint), source)
  steps = saved_steps(source)
  if steps:
    chosen = start.checkpoint.choose(source, steps)
    return Origin((source / "checkpoints" / str(chosen)).expanduser().resolve(), source)
  if start.stage is not None or (source / "checkpoints").exists():
    raise ConfigError(f"there is no checkpoint in {source} to start from; train it first")
  if start.optimizer == "keep":
    raise ConfigError(
      f"start.optimizer='keep' needs a workdir of ours, and {source} is none; set it to 'reset'"
    )
  if not hub.is_store(source):
    _check_released(source, model)
  return Origin(None, source)


def write_origin(origin: Origin, workdir: epath.Path):
  """Keeps the choice, so that a run that is killed before it saves begins there again."""
  if jax.process_index() == 0 and not (workdir / START_FILE).exists():
    checkpoint = None if origin.checkpoint is None else os.fspath(origin.checkpoint)
    new = workdir / f"{START_FILE}.new"
    # Absolute, so that adapters find their weights from anywhere; the id of a hub stays.
    source = origin.source.expanduser()
    source = source.resolve() if source.exists() else origin.source
    new.write_text(json.dumps({"source": os.fspath(source), "checkpoint": checkpoint}))
    new.replace(workdir / START_FILE)


def origin_tokenizer(origin: Origin) -> Tokenizer | None:
  """The tokenizer of the run that a run begins from; None where it is no run of ours."""
  return None if origin.checkpoint is None else load_tokenizer(_tokenizer_folder(origin))


def check_tokenizer(origin: Origin, tokenizer: Tokenizer):
  """Makes sure that ids mean to the new run what they meant to the run it begins from.

  The new tokenizer may know more ids, such as the special tokens of a chat template.

  Raises:
    ConfigError: if an id of the origin means something else.
  """
  saved = origin_tokenizer(origin)
  if saved is not None and not hub.same_ids(saved, tokenizer):
    raise ConfigError(
      f"the tokenizer of the data is not that of {origin.checkpoint}, so its ids would mean other "
      f"text; use the one in {_tokenizer_folder(origin)}"
    )


def _tokenizer_folder(origin: Origin) -> epath.Path:
  return origin.checkpoint / "run" / "tokenizer"


def read_origin(
  origin: Origin,
  start: Start,
  optimizer: optax.GradientTransformation,
  abstract: TrainState,
  model: ModelConfig,
) -> TrainState:
  """The first state of a run: the origin's parameters, its moments if they are kept, counters at 0.

  Args:
    origin: see `find_origin`.
    start: says whether the moments of the optimizer are kept.
    optimizer: of the new run.
    abstract: shapes, types and shardings of the state, see `lladax.train.abstract_state`.
    model: of the new run.

  Raises:
    CheckpointError: if the origin holds other arrays than the state has, or is damaged.
    ConfigError: if released weights are of another architecture.
  """
  if origin.checkpoint is None or start.optimizer == "reset":
    return state_from(read_weights(origin, abstract.params, model), optimizer, abstract)
  logging.info("starting from %s", origin.checkpoint)
  try:
    saved = read_train_state(origin.checkpoint, abstract)
  except CheckpointError as error:
    raise CheckpointError(f"{error}; start.optimizer='reset' takes parameters only") from error
  zero = {
    name: jnp.zeros_like(getattr(saved, name))
    for name in ("step", "skipped_in_a_row", "skipped_total")
  }
  return dataclasses.replace(saved, opt_state=_from_the_first_step(saved.opt_state), **zero)


def read_weights(origin: Origin, abstract, model: ModelConfig) -> Any:
  """The parameters of the origin, placed and typed as in `abstract`.

  Raises:
    CheckpointError: if it holds other arrays, or is damaged.
    ConfigError: if released weights are of another architecture.
  """
  logging.info("starting from %s", origin.checkpoint or origin.source)
  if origin.checkpoint is None:
    return _released(origin.source, abstract, model)
  return load_params(origin.checkpoint, lambda _: abstract).params


def _from_the_first_step(opt_state):
  """The moments of an optimizer, its learning rate schedule at the beginning."""

  def reset(part):
    if isinstance(part, optax.ScaleByScheduleState):
      return part._replace(count=jnp.zeros_like(part.count))
    return part

  is_schedule = lambda part: isinstance(part, optax.ScaleByScheduleState)  # noqa: E731
  return jax.tree.map(reset, opt_state, is_leaf=is_schedule)


def data_position(origin: Origin, start: Start) -> Any:
  """What the data iterator of the origin was, to go on after it; None to begin anew."""
  if origin.checkpoint is None or start.data == "restart":
    return None
  return read_iterators(origin.checkpoint).get("data")


def _ids(model: ModelConfig) -> dict[str, int]:
  """The run's special ids, those of its tokenizer, where a folder tells none."""
  ids = {name: getattr(model, name) for name in hub.IDS}
  return {name: value for name, value in ids.items() if value is not None}


def _check_released(path: epath.Path, model: ModelConfig):
  """Compares a folder's architecture with the model's, before weights are read.

  Raises:
    ConfigError: with the fields in which they differ.
  """
  plan = plan_import(os.fspath(path), ids=_ids(model))
  _require_shapes(path, abstract_params(plan.config), plan.config, model)


def _require_shapes(path: epath.Path, theirs, there: ModelConfig, model: ModelConfig):
  ours = abstract_params(model)
  shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (theirs, ours)]
  if shapes[0] == shapes[1]:
    return
  fields = ", ".join(
    f"{field.name}: {getattr(there, field.name)} there, {getattr(model, field.name)} here"
    for field in dataclasses.fields(ModelConfig)
    if field.name.endswith(("_size", "_heads", "_layers", "_dim", "moe"))
    and getattr(there, field.name) != getattr(model, field.name)
  )
  raise ConfigError(
    f"the weights of {path} are of another architecture than the run's model "
    f"({fields or 'its parameters have other names or shapes'})"
  )


def _released(path: epath.Path, abstract, model: ModelConfig) -> Any:
  """Parameters of a Hugging Face folder or id, or an imported store, as the run keeps them."""
  mesh = jax.tree.leaves(abstract)[0].sharding.mesh
  if hub.is_store(path):
    loaded = hub.open_store(path, mesh=mesh, dtype=model.param_dtype)
  else:
    loaded = hub.load_folder(os.fspath(path), mesh=mesh, dtype=model.param_dtype, ids=_ids(model))
  _require_shapes(path, loaded.params, loaded.config, model)
  return jax.tree.map(
    lambda x, to: jax.device_put(x.astype(to.dtype), to.sharding), loaded.params, abstract
  )


def _listed(steps: Sequence[int]) -> str:
  return ", ".join(map(str, steps[-8:])) if len(steps) <= 8 else f"..., {_listed(steps[-8:])}"
