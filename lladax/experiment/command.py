"""The command of an experiment file: flags, overrides, exit status."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from etils import epath

from lladax.config import ConfigError, fields_help, override
from lladax.experiment.config import Experiment
from lladax.train import CheckpointError, GuardError, NoiseDrift, NonFiniteError

Train = Callable[[Experiment, epath.Path], object]
ALL, DEBUG = "all", "debug"


def main(
  config: Callable[..., Experiment],
  train: Train,
  evaluate: Train | None = None,
  *,
  stages: Sequence[str] = (),
):
  """The command of an experiment file: `if __name__ == "__main__": main(config, train, evaluate)`.

  `--workdir` resumes what is there; `--set a.b=value` changes a field; `--mode` chooses; `--help`
  lists the fields. A mistake in them ends with one line and status 2.

  Args:
    config: makes the experiment, before any device is touched. With stages it takes the name of
      one; if it takes `debug`, too, `--config=<stage>:debug` is its toy twin.
    train: trains it in a workdir.
    evaluate: evaluates what was trained there, after training too.
    stages: in their order; `--config=all` runs one after the other.
  """
  defaults = chosen(config, stages, "")[0]
  modes = ["all", "train", "evaluate"] if evaluate else ["train"]
  own = ["workdir", "mode", "profile_steps", "set"]
  own += ["distributed", "coordinator", "num_processes", "process_id"]
  flags.DEFINE_string(
    "workdir",
    None,
    f"Directory of the run; what is there is resumed. Default: runs/{defaults.name}.",
  )
  names = _names(config, stages)
  if names:
    own.append("config")
    flags.DEFINE_string("config", names[0], f"Which config: one of {', '.join(names)}.")
  flags.DEFINE_enum("mode", modes[0], modes, "What to do; all: train, then evaluate.")
  flags.DEFINE_bool(
    "distributed", False, "One process per host; they find each other on TPUs, Slurm and GKE."
  )
  flags.DEFINE_string("coordinator", None, "With --distributed, elsewhere: host:port of process 0.")
  flags.DEFINE_integer("num_processes", None, "With --coordinator.", lower_bound=1)
  flags.DEFINE_integer("process_id", None, "With --coordinator.", lower_bound=0)
  flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST, steps of which a trace is written to <workdir>/profile."
  )
  flags.DEFINE_multi_string(
    "set", [], "Changes a field, e.g. --set steps=100. Fields:\n" + fields_help(defaults)
  )
  for name in own:
    # As flags of the program that runs, so that --help shows them.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

  def run(_):
    if not flags.FLAGS["verbosity"].present:
      # The libraries below tell of every file they move.
      logging.set_verbosity(logging.WARNING)
    if flags.FLAGS.distributed:  # before anything touches a device
      jax.distributed.initialize(
        flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id
      )
    assignments = list(flags.FLAGS.set)
    if flags.FLAGS.profile_steps:
      assignments.append(f"profile_steps=({flags.FLAGS.profile_steps.replace(':', ', ')})")
    sys.exit(
      run_command(
        lambda: chosen(config, stages, flags.FLAGS.config if names else ""),
        {"train": train, "evaluate": evaluate},
        workdir=flags.FLAGS.workdir,
        assignments=assignments,
        mode=flags.FLAGS.mode,
      )
    )

  app.run(run)


def run_command(
  configs: Experiment | Callable[[], list[Experiment]],
  parts: dict[str, Train | None],
  *,
  workdir: str | None,
  assignments: Sequence[str],
  mode: str,
) -> int:
  """`main` after its flags were read: the exit status, 0, 1 (a guard ended it), 2 (input), 130 (^C).

  Several experiments are run one after the other, each in the directory `<workdir>/<stage>`.
  """
  try:
    several = [configs] if isinstance(configs, Experiment) else configs()
    for config in [override(config, assignments) for config in several]:
      path = epath.Path(workdir or f"runs/{config.name}")
      if len(several) > 1 and workdir:
        path = path / config.name.rpartition("/")[2]
      for name, part in parts.items():
        if part is not None and mode in (name, "all"):
          part(config, path)
  except (NonFiniteError, GuardError, NoiseDrift) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except (ConfigError, CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  return 0


def chosen(config: Callable[..., Experiment], stages: Sequence[str], text: str) -> list[Experiment]:
  """The experiments of a text such as "", "anneal_2", "anneal_2:debug" or "all:debug".

  Raises:
    ConfigError: for a name that is none, with those that are.
  """
  name, _, variant = text.partition(":")
  if name == DEBUG and not variant:
    name, variant = "", DEBUG
  known = name in ("", *stages) or (stages and name == ALL)
  if not known or variant not in ("", DEBUG) or (variant and not _has_debug(config)):
    raise ConfigError(
      f"there is no config {text!r}; one of {', '.join(_names(config, stages)) or 'none by name'}"
    )
  keywords = {"debug": True} if variant else {}
  if not stages:
    return [config(**keywords)]
  return [config(stage, **keywords) for stage in (stages if name == ALL else [name or stages[0]])]


def _names(config: Callable[..., Experiment], stages: Sequence[str]) -> list[str]:
  names = [*stages, ALL] if stages else []
  if _has_debug(config):
    names += [f"{name}:{DEBUG}" for name in names] or ["", DEBUG]
  return names


def _has_debug(config: Callable[..., Experiment]) -> bool:
  return DEBUG in inspect.signature(config).parameters
