"""The command of an experiment file: flags, overrides, exit status."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from lladax.config import ConfigError, fields_help, override
from lladax.experiment.config import Experiment
from lladax.train import CheckpointError, NonFiniteError

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
