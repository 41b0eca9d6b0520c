"""An experiment as one config, and the run that it describes.

An experiment file has `config()`, which builds an `Experiment`, and `train(config, workdir)`, which
opens a run and trains it; `main(config, train)` makes a command of them.
"""

from lladax.experiment.command import main, run_command
from lladax.experiment.config import Experiment
from lladax.experiment.run import Run, open_run, train, train_step, with_special_ids

__all__ = [
  "Experiment",
  "Run",
  "main",
  "open_run",
  "run_command",
  "train",
  "train_step",
  "with_special_ids",
]
