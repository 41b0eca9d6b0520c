"""A run of an experiment: opened, resumed, trained. The only place that knows all packages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from lladax.config import ConfigError, to_json
from lladax.data import Data, Fingerprint, Tokenizer, TrainIterator, load_data
from lladax.experiment.config import RESUMABLE, Experiment
from lladax.experiment.rates import amounts_per_step
from lladax.experiment.start import (
  Origin,
  check_tokenizer,
  data_position,
  find_origin,
  origin_tokenizer,
  read_origin,
  read_weights,
  write_origin,
)
from lladax.models import abstract_params, init_variables
from lladax.sharding import BATCH_AXES, make_mesh, own_rows, use_mesh
from lladax.train import (
  CheckpointError,
  Checkpoints,
  GuardConfig,
  Metrics,
  NoiseWatch,
  NonFiniteError,
  SpikeGuard,
  StepBack,
  TrainState,
  abstract_state,
  add_rollback,
  every,
  fit,
  heldout_bound,
  init_state,
  learning_rate,
  make_diffusion_step,
  make_optimizer,
  plan_rollback,
  read_rollbacks,
  state_shardings,
  stop_on_nonfinite,
  warn_of_drops,
  write_run_record,
)
from lladax.train.checkpoint import require_same_config
from lladax.train.loop import Hook, Reader, TrainStep, place
from lladax.train.profile import Trace
from lladax.tune import attach, init_adapters, make_lora_step

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
    readers: of the metrics of every step, besides `metrics`: the watch over the noise, and guards.
    base: the weights that adapters are for (`config.lora`), which stay; else None.
  """

  config: Experiment
  workdir: epath.Path
  data: Data
  mesh: jax.sharding.Mesh
  state: TrainState
  batches: TrainIterator
  metrics: Metrics
  checkpoints: Checkpoints
  readers: tuple[Reader, ...] = ()
  base: Any = None

  def weights(self, state: TrainState) -> Any:
    """Parameters for whatever takes them, such as `heldout_bound`: of a state, on their base."""
    if self.config.lora is None:
      return state.params
    return attach(self.config.model, self.config.lora, self.base, state.params)


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
    config, data, mesh, origin = _check(config, workdir)
  _write_config(config, workdir)
  if origin is not None:
    write_origin(origin, workdir)
  write_run_record(workdir)
  batches = data.train_iterator(rows=own_rows(mesh, config.data.batch_size))
  metrics = Metrics(
    workdir,
    steps=config.steps,
    every=config.log_every,
    tokens_per_step=config.data.batch_size * config.data.length,
    rates=amounts_per_step(config, mesh.devices.reshape(-1)),
    also=lambda step: {f"epoch/{name}": n for name, n in batches.epochs(step).items()},
  )
  noise = NoiseWatch(config.objective.times, on_drift=config.on_drift, write=metrics.write)
  guard = SpikeGuard(config.guard or GuardConfig(spike=None))
  iterators = {"data": batches, "metrics": metrics, "noise": noise, "guard": guard}
  with use_mesh(mesh), metrics, _checkpoints(config, workdir, data, iterators) as checkpoints:
    state, base = restore_or_start(config, mesh, checkpoints, batches, origin)
    yield Run(
      config=config,
      workdir=workdir,
      data=data,
      mesh=mesh,
      state=state,
      base=base,
      batches=batches,
      metrics=metrics,
      checkpoints=checkpoints,
      readers=(
        noise,
        guard,
        warn_of_drops,
        stop_on_nonfinite(config.max_nonfinite, checkpoints),
      ),
    )


def _check(config: Experiment, workdir: epath.Path):
  """(resolved config, data, mesh, origin or None), before anything is written or computed."""
  _check_workdir(config, workdir)
  origin = tokenizer = None
  if config.start is not None:
    origin = find_origin(config.start, workdir, config.model)
    if getattr(config.data, "tokenizer", "") is None:
      tokenizer = origin_tokenizer(origin)
  data = load_data(config.data, tokenizer=tokenizer, vocab_size=config.model.vocab_size)
  config = with_special_ids(config, data.tokenizer)
  mesh = make_mesh(config.mesh)
  _check_mesh(config, mesh)
  if origin is not None:
    check_tokenizer(origin, data.tokenizer)
  return config, data, mesh, origin


def _checkpoints(config: Experiment, workdir: epath.Path, data: Data, iterators) -> Checkpoints:
  return Checkpoints(
    workdir / "checkpoints",
    config=config,
    iterators={"corpus": Fingerprint(data), **iterators},
    files={"tokenizer": data.tokenizer.save},
    keep=config.keep,
    keep_every=config.keep_every,
    keep_best=config.keep_best and functools.partial(config.keep_best.find, workdir),
    may_differ=RESUMABLE,
  )


def train(run: Run, hooks: Sequence[Hook] = ()) -> TrainState:
  """Trains an open run to its last step; hooks run before the save of their step.

  Raises:
    NonFiniteError: if too many steps in a row have a loss or gradient that is not finite.
    GuardError: if the run was set back too often, or there is nothing to set it back to.
    NoiseDrift: if the noise is not the schedule's, and the config says to stop.
  """
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state
  )
  step = train_step(run.config, state_shardings(run.state), run.base)
  while True:
    try:
      return _train(run, step, hooks)
    except StepBack as alarm:
      guard = run.config.guard
      if guard is None or (isinstance(alarm, NonFiniteError) and not guard.nonfinite):
        raise
      run = _set_back(run, alarm, abstract)


def heldout_hook(run: Run, *, mc_num: int = 2, max_batches: int | None = 2) -> Hook:
  """Every `eval_every` steps, and at the end, the bound on held-out text: a record, see
  `lladax.train.heldout_bound`. By default of a part of the text, the same every time; where no text
  is held out, nothing.
  """
  if not run.data.has_heldout:
    logging.warning("no text is held out, so the run is not scored")
    return every(run.config.eval_every, lambda step, state: None)
  bound = heldout_bound(
    run.config.model, run.data, run.mesh, mc_num=mc_num, max_batches=max_batches
  )

  def score(step: int, state: TrainState):
    run.metrics.write(step, bound(run.weights(state)))

  return every(run.config.eval_every, score, at_end=True)


def _train(run: Run, step_function: TrainStep, hooks: Sequence[Hook]) -> TrainState:
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
      step_function,
      steps=config.steps,
      readers=[run.metrics, *run.readers],
      hooks=hooks,
    )


def _set_back(run: Run, alarm: StepBack, abstract: TrainState) -> Run:
  """The run as it was before what the alarm is about; see `lladax.train.guards` for the order."""
  run.checkpoints.wait()
  past = read_rollbacks(run.workdir)
  rollback = plan_rollback(run.config.guard, alarm, run.checkpoints.all_steps, past)
  logging.warning("%s; back to step %d, on with batch %d", alarm, rollback.to, rollback.next_batch)
  run.checkpoints.set_aside_after(rollback.to)
  if jax.process_index() == 0:
    add_rollback(run.workdir, rollback)
  state = run.checkpoints.restore(abstract)
  _skip_to(run.batches, rollback.next_batch)
  return dataclasses.replace(run, state=state)


def _skip_to(batches: TrainIterator, next_batch: int):
  batches.set_state({"next_index": next_batch, "start": batches.start})


def restore_or_start(
  config: Experiment,
  mesh: jax.sharding.Mesh,
  checkpoints: Checkpoints,
  batches: TrainIterator,
  origin: Origin | None = None,
) -> tuple[TrainState, Any]:
  """(the newest whole checkpoint, else what the run begins with; the weights under its adapters).

  Within `use_mesh(mesh)`. `batches` is set to where the state is.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)
  base, init = None, lambda key: init_variables(config.model, key)["params"]
  abstract = abstract_state(init, optimizer, mesh)
  if config.lora is not None:
    base = read_weights(origin, abstract.params, config.model)
    init = functools.partial(init_adapters, config.model, config.lora)
    abstract = abstract_state(init, optimizer, mesh)
  restored = checkpoints.restore(abstract)
  if restored is not None:
    rollbacks = read_rollbacks(checkpoints.directory.parent)
    if rollbacks and rollbacks[-1].to == int(restored.step):
      # Killed after it was set back to this checkpoint, and before the next one.
      _skip_to(batches, rollbacks[-1].next_batch)
    return restored, base
  position = None if origin is None else data_position(origin, config.start)
  if position is not None:
    batches.continue_after(position)
  if origin is None or base is not None:
    return init_state(init, optimizer, config.seed, mesh), base
  return read_origin(origin, config.start, optimizer, abstract, config.model), None


def train_step(
  config: Experiment, shardings: TrainState | None = None, base: Any = None
) -> TrainStep:
  """The jitted step `(state, batch) -> (state, metrics)` of this experiment.

  Args:
    shardings: of the state, see `lladax.train.state_shardings`.
    base: the weights that adapters are for, where `config.lora` is given.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)
  options = {
    "seed": config.seed,
    "microbatches": config.microbatches,
    "learning_rate": learning_rate(config.optimizer, config.steps),
    "shardings": shardings,
  }
  if config.lora is None:
    return make_diffusion_step(config.model, config.objective, optimizer, **options)
  step = make_lora_step(config.model, config.lora, config.objective, optimizer, **options)
  return functools.partial(step, base)


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
