"""A run of an experiment: opened, resumed, trained. The only place that knows all packages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence

import jax
from etils import epath

from lladax.config import ConfigError, to_json
from lladax.data import Data, Fingerprint, Tokenizer, load_data
from lladax.experiment.config import RESUMABLE, Experiment
from lladax.experiment.rates import amounts_per_step
from lladax.experiment.start import (
  Origin,
  check_tokenizer,
  data_position,
  find_origin,
  read_origin,
  write_origin,
)
from lladax.models import abstract_params, init_variables
from lladax.sharding import BATCH_AXES, make_mesh, own_rows, use_mesh
from lladax.train import (
  CheckpointError,
  Checkpoints,
  Metrics,
  TrainState,
  abstract_state,
  every,
  fit,
  init_state,
  learning_rate,
  make_diffusion_step,
  make_optimizer,
  state_shardings,
  stop_on_nonfinite,
  warn_of_drops,
  write_run_record,
)
from lladax.train.checkpoint import require_same_config
from lladax.train.loop import Hook, place
from lladax.train.profile import Trace
from lladax.types import Batch

# The tokenizer settles these, after the config was written.
SPECIAL_IDS = ("mask_token_id", "eos_token_id", "pad_token_id")
CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
  """A run that is open: what its hooks and its evaluation need.

  Attributes:
    config: resolved, with the ids of the tokenizer.
    workdir: its directory.
    data: corpus and tokenizer.
    mesh: in force while the run is open.
    state: fresh, or of the newest whole checkpoint. Training donates it: use what `train` returns.
    batches: the data iterator, at the step of `state`.
    metrics: writes records: `run.metrics.write(step, {"heldout/bits": 1.5})`.
    checkpoints: of this run.
  """

  config: Experiment
  workdir: epath.Path
  data: Data
  mesh: jax.sharding.Mesh
  state: TrainState
  batches: Iterator[Batch]
  metrics: Metrics
  checkpoints: Checkpoints


@contextlib.contextmanager
def open_run(config: Experiment, workdir: str | os.PathLike) -> Iterator[Run]:
  """Loads the data, opens the mesh, and resumes what is in `workdir` or starts afresh.

  On leaving, the save that is under way is finished.

  Raises:
    ConfigError: for data, a mesh or a workdir that does not fit the config; nothing was overwritten.
    CheckpointError: if there are checkpoints and none is whole.
  """
  workdir = epath.Path(workdir)
  with _one_line():
    _check_workdir(config, workdir)
    data = load_data(config.data, vocab_size=config.model.vocab_size)
    config = with_special_ids(config, data.tokenizer)
    mesh = make_mesh(config.mesh)
    _check_mesh(config, mesh)
    origin = None
    if config.start is not None:
      origin = find_origin(config.start, workdir, config.model)
      check_tokenizer(origin, data.tokenizer)
  _write_config(config, workdir)
  if origin is not None:
    write_origin(origin, workdir)
  write_run_record(workdir)
  batches = data.train_iterator(rows=own_rows(mesh, config.data.batch_size))
  with (
    use_mesh(mesh),
    Metrics(
      workdir,
      steps=config.steps,
      every=config.log_every,
      tokens_per_step=config.data.batch_size * config.data.length,
      rates=amounts_per_step(config, mesh.devices.reshape(-1)),
      also=lambda step: {f"epoch/{name}": n for name, n in batches.epochs(step).items()},
    ) as metrics,
    Checkpoints(
      workdir / "checkpoints",
      config=config,
      iterators={"corpus": Fingerprint(data), "data": batches, "metrics": metrics},
      files={"tokenizer": data.tokenizer.save},
      keep=config.keep,
      keep_every=config.keep_every,
      keep_best=config.keep_best and functools.partial(config.keep_best.find, workdir),
      may_differ=RESUMABLE,
    ) as checkpoints,
  ):
    yield Run(
      config=config,
      workdir=workdir,
      data=data,
      mesh=mesh,
      state=restore_or_start(config, mesh, checkpoints, batches, origin),
      batches=batches,
      metrics=metrics,
      checkpoints=checkpoints,
    )


def train(run: Run, hooks: Sequence[Hook] = ()) -> TrainState:
  """Trains an open run to its last step; hooks run before the save of their step."""
  config, step = run.config, int(run.state.step)
  run.metrics.start(step)
  save = every(config.save_every, run.checkpoints.save, at_end=True, on_stop=True)
  with contextlib.ExitStack() as stack:
    hooks = [*hooks, save]
    if config.profile_steps is not None:
      first, last = config.profile_steps
      trace = Trace(first, last, step=step, directory=run.workdir / "profile")
      hooks = [stack.enter_context(trace), *hooks]
    return fit(
      run.state,
      map(lambda batch: place(batch, run.mesh), run.batches),
      train_step(config, state_shardings(run.state)),
      steps=config.steps,
      readers=[
        run.metrics,
        warn_of_drops,
        stop_on_nonfinite(config.max_nonfinite, run.checkpoints),
      ],
      hooks=hooks,
    )


def restore_or_start(
  config: Experiment,
  mesh: jax.sharding.Mesh,
  checkpoints: Checkpoints,
  batches: Iterator[Batch],
  origin: Origin | None = None,
) -> TrainState:
  """The newest whole checkpoint, else the origin of the run, else fresh parameters.

  Within `use_mesh(mesh)`. `batches` is set to where the state is.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)

  def init_params(key):
    return init_variables(config.model, key)["params"]

  abstract = abstract_state(init_params, optimizer, mesh)
  restored = checkpoints.restore(abstract)
  if restored is not None:
    return restored
  if origin is None:
    return init_state(init_params, optimizer, config.seed, mesh)
  position = data_position(origin, config.start)
  if position is not None:
    batches.continue_after(position)
  return read_origin(origin, config.start, optimizer, abstract, config.model)


def train_step(config: Experiment, shardings: TrainState | None = None):
  """The jitted step `(state, batch) -> (state, metrics)` of this experiment."""
  return make_diffusion_step(
    config.model,
    config.objective,
    make_optimizer(config.optimizer, config.steps),
    seed=config.seed,
    microbatches=config.microbatches,
    learning_rate=learning_rate(config.optimizer, config.steps),
    shardings=shardings,
  )


# --- Opening ---


def with_special_ids(config: Experiment, tokenizer: Tokenizer) -> Experiment:
  """The config with the special ids of the tokenizer: they come from nowhere else."""
  ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "pad")}
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **ids))


def _check_workdir(config: Experiment, workdir: epath.Path):
  path = workdir / CONFIG_FILE
  if path.exists():
    ids = [f"model.{name}" for name in SPECIAL_IDS]
    try:
      saved = json.loads(path.read_text())
    except json.JSONDecodeError as error:
      raise ConfigError(f"{path} is not JSON ({error}); move it away to go on") from error
    require_same_config(saved, config, workdir, may_differ=(*RESUMABLE, *ids))
  elif workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"the workdir {workdir} is a file")


def _check_mesh(config: Experiment, mesh: jax.sharding.Mesh):
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  rows = config.data.batch_size // config.microbatches
  if rows % shards:
    raise ConfigError(
      f"{rows} rows (data.batch_size / microbatches) do not divide over the {shards} devices of "
      "the mesh's data, fsdp and expert axes"
    )
  with use_mesh(mesh):  # the layers refuse what their heads and experts do not divide over
    abstract_params(config.model, (rows, config.data.length))


def _write_config(config: Experiment, workdir: epath.Path):
  if jax.process_index() != 0:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  new = workdir / f"{CONFIG_FILE}.new"
  new.write_text(to_json(config) + "\n")
  new.replace(workdir / CONFIG_FILE)


@contextlib.contextmanager
def _one_line():
  """What is wrong with the input, found while a run is opened, as a `ConfigError`."""
  try:
    yield
  except (ConfigError, CheckpointError):
    raise
  except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
    raise ConfigError(" ".join(str(error).split())) from error
