"""An experiment as one config, and the run that it describes: the only place that knows all packages.

An experiment file has `config()`, which builds an `Experiment`, and `train(config, workdir)`, which
opens a run and trains it; `main(config, train)` makes a command of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging

from lladax.config import ConfigError, fields_help, override, to_json
from lladax.data import Data, DataConfig, Fingerprint, Tokenizer, load_data
from lladax.diffusion import Objective, masked_nll
from lladax.infer import SamplerConfig
from lladax.models import ModelConfig, abstract_params, bind_token_nll, init_variables
from lladax.sharding import BATCH_AXES, MeshConfig, make_mesh, use_mesh
from lladax.train import (
  CheckpointError,
  Checkpoints,
  Metrics,
  NonFiniteError,
  OptimizerConfig,
  TrainState,
  abstract_state,
  every,
  fit,
  init_state,
  learning_rate,
  make_optimizer,
  make_train_step,
  router_metrics,
  state_shardings,
  stop_on_nonfinite,
  warn_of_drops,
  write_run_record,
)
from lladax.train.checkpoint import require_same_config
from lladax.train.loop import Hook, place
from lladax.types import Batch, Sums

# A run may be resumed with other values of these: they change neither its noise nor its data nor
# its mathematics, or (steps) say how long it goes on.
RESUMABLE = (
  "steps", "microbatches", "mesh", "sampler", "log_every", "eval_every", "save_every", "keep",
  "keep_every", "max_nonfinite", "data.prefetch", "model.remat", "model.scan_unroll",
  "model.moe.exchange", "model.moe.implementation",
)  # fmt: skip
# The tokenizer settles these, after the config was written.
SPECIAL_IDS = ("mask_token_id", "eos_token_id", "pad_token_id")
CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything that decides how a run goes.

  Attributes:
    name: of the run; its default workdir is `runs/<name>`.
    model: the network. Its special ids are set to those of the tokenizer.
    objective: the loss and the noise.
    data: text, tokenizer and batches.
    optimizer: AdamW and its learning rate.
    sampler: how the trained model decodes unless told otherwise.
    mesh: devices by axis.
    seed: of the parameters and of the noise; the order of the data has its own.
    steps: length of the run.
    microbatches: parts of the batch that go through the network one after the other.
    log_every: steps per record of the metrics.
    eval_every: steps between evaluations.
    save_every: steps between checkpoints.
    keep: checkpoints kept, the newest.
    keep_every: multiples of this step are kept besides.
    max_nonfinite: steps in a row with a loss or gradient that is not finite, at which a run ends.

  Raises:
    ValueError: for numbers out of range, or parts that do not fit each other.
  """

  name: str
  model: ModelConfig
  objective: Objective = Objective()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  sampler: SamplerConfig = SamplerConfig()
  mesh: MeshConfig = MeshConfig()
  seed: int = 0
  steps: int = 1000
  microbatches: int = 1
  log_every: int = 10
  eval_every: int = 500
  save_every: int = 500
  keep: int = 2
  keep_every: int | None = None
  max_nonfinite: int = 20

  def __post_init__(self):
    for field in ("steps", "microbatches", "log_every", "eval_every", "save_every", "keep",
                  "max_nonfinite"):  # fmt: skip
      if getattr(self, field) < 1:
        raise ValueError(f"{field} is at least 1; got {getattr(self, field)}")
    if self.data.batch_size % self.microbatches:
      raise ValueError(
        f"data.batch_size {self.data.batch_size} does not split into {self.microbatches} "
        "microbatches"
      )
    if self.data.length > self.model.max_position_embeddings:
      raise ValueError(
        f"data.length {self.data.length} is longer than the model's context, "
        f"model.max_position_embeddings {self.model.max_position_embeddings}"
      )
    make_optimizer(self.optimizer, self.steps)


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
  workdir: pathlib.Path
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
  workdir = pathlib.Path(workdir)
  with _one_line():
    _check_workdir(config, workdir)
    data = load_data(config.data, vocab_size=config.model.vocab_size)
    config = with_special_ids(config, data.tokenizer)
    mesh = make_mesh(config.mesh)
    _check_mesh(config, mesh)
  _write_config(config, workdir)
  write_run_record(workdir)
  batches = data.train_iterator()
  tokens_per_step = config.data.batch_size * config.data.length
  with (
    use_mesh(mesh),
    Metrics(
      workdir, steps=config.steps, every=config.log_every, tokens_per_step=tokens_per_step
    ) as metrics,
    Checkpoints(
      workdir / "checkpoints",
      config=config,
      iterators={"data": batches, "metrics": metrics, "corpus": Fingerprint(data)},
      files={"tokenizer": data.tokenizer.save},
      keep=config.keep,
      keep_every=config.keep_every,
      may_differ=RESUMABLE,
    ) as checkpoints,
  ):
    yield Run(
      config=config,
      workdir=workdir,
      data=data,
      mesh=mesh,
      state=restore_or_initialise(config, mesh, checkpoints),
      batches=batches,
      metrics=metrics,
      checkpoints=checkpoints,
    )


def train(run: Run, hooks: Sequence[Hook] = ()) -> TrainState:
  """Trains an open run to its last step; hooks run before the save of their step."""
  config = run.config
  run.metrics.start(int(run.state.step))
  save = every(config.save_every, run.checkpoints.save, at_end=True, on_stop=True)
  return fit(
    run.state,
    map(lambda batch: place(batch, run.mesh), run.batches),
    train_step(config, state_shardings(run.state)),
    steps=config.steps,
    readers=[run.metrics, warn_of_drops, stop_on_nonfinite(config.max_nonfinite, run.checkpoints)],
    hooks=[*hooks, save],
  )


def restore_or_initialise(
  config: Experiment, mesh: jax.sharding.Mesh, checkpoints: Checkpoints
) -> TrainState:
  """The newest whole checkpoint, else fresh parameters. Within `use_mesh(mesh)`."""
  optimizer = make_optimizer(config.optimizer, config.steps)

  def init_params(key):
    return init_variables(config.model, key)["params"]

  restored = checkpoints.restore(abstract_state(init_params, optimizer, mesh))
  return init_state(init_params, optimizer, config.seed, mesh) if restored is None else restored


def train_step(config: Experiment, shardings: TrainState | None = None):
  """The jitted step `(state, batch) -> (state, metrics)` of this experiment."""
  return make_train_step(
    lambda batch, step: _noise(config, batch, step),
    lambda params, examples, share: _loss(config, params, examples, share),
    make_optimizer(config.optimizer, config.steps),
    microbatches=config.microbatches,
    learning_rate=learning_rate(config.optimizer, config.steps),
    shardings=shardings,
  )


def _noise(config: Experiment, batch: Batch, step: jax.Array):
  mask_id = config.model.mask_token_id
  return batch, config.objective.noise(batch, config.seed, step, mask_id=mask_id)


def _loss(config: Experiment, params, examples, share: float):
  batch, noised = examples
  token_nll = bind_token_nll(config.model, params, batch.positions, batch.segment_ids)
  objective = config.objective
  loss, sums, stats = masked_nll(token_nll, batch, noised, objective=objective, share=share)
  if stats is None:
    return loss, sums
  router = router_metrics(stats, share, may_drop=config.model.moe.exchange.may_drop)
  return loss, Sums(sums.sums | router.sums, sums.counts | router.counts)


# --- Opening ---


def with_special_ids(config: Experiment, tokenizer: Tokenizer) -> Experiment:
  """The config with the special ids of the tokenizer: they come from nowhere else."""
  ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "pad")}
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **ids))


def _check_workdir(config: Experiment, workdir: pathlib.Path):
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


def _write_config(config: Experiment, workdir: pathlib.Path):
  if jax.process_index() != 0:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  new = workdir / f"{CONFIG_FILE}.new"
  new.write_text(to_json(config) + "\n")
  os.replace(new, workdir / CONFIG_FILE)


@contextlib.contextmanager
def _one_line():
  """What is wrong with the input, found while a run is opened, as a `ConfigError`."""
  try:
    yield
  except (ConfigError, CheckpointError):
    raise
  except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
    raise ConfigError(" ".join(str(error).split())) from error


# --- The command ---

Train = Callable[[Experiment, pathlib.Path], object]


def main(config: Callable[[], Experiment], train: Train, evaluate: Train | None = None):
  """The command of an experiment file: `if __name__ == "__main__": main(config, train, evaluate)`.

  `--workdir` resumes what is there; `--set a.b=value` changes a field; `--mode` chooses; `--help`
  lists the fields. A mistake in them ends with one line and status 2.

  Args:
    config: makes the experiment; called before any device is touched.
    train: trains it in a workdir.
    evaluate: evaluates what was trained there, after training too.
  """
  defaults = config()
  modes = ["all", "train", "evaluate"] if evaluate else ["train"]
  flags.DEFINE_string(
    "workdir",
    None,
    f"Directory of the run; what is there is resumed. Default: runs/{defaults.name}.",
  )
  flags.DEFINE_enum("mode", modes[0], modes, "What to do; all: train, then evaluate.")
  flags.DEFINE_bool(
    "distributed", False, "Call jax.distributed.initialize() first: one process per host."
  )
  flags.DEFINE_multi_string(
    "set", [], "Changes a field, e.g. --set steps=100. Fields:\n" + fields_help(defaults)
  )
  for name in ("workdir", "mode", "distributed", "set"):
    # As flags of the program that runs, so that --help shows them.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

  def run(_):
    if not flags.FLAGS["verbosity"].present:
      # The libraries below tell of every file they move.
      logging.set_verbosity(logging.WARNING)
    if flags.FLAGS.distributed:
      jax.distributed.initialize()
    sys.exit(
      run_command(
        defaults,
        {"train": train, "evaluate": evaluate},
        workdir=flags.FLAGS.workdir,
        assignments=flags.FLAGS.set,
        mode=flags.FLAGS.mode,
      )
    )

  app.run(run)


def run_command(
  defaults: Experiment,
  parts: dict[str, Train | None],
  *,
  workdir: str | None,
  assignments: Sequence[str],
  mode: str,
) -> int:
  """`main` after its flags were read: the exit status, 0, 1 (not finite), 2 (input), 130 (^C)."""
  try:
    config = override(defaults, assignments)
    path = pathlib.Path(workdir or f"runs/{config.name}")
    for name, part in parts.items():
      if part is not None and mode in (name, "all"):
        part(config, path)
  except (ConfigError, CheckpointError, NonFiniteError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1 if isinstance(error, NonFiniteError) else 2
  except KeyboardInterrupt:
    return 130
  return 0
