"""An experiment as one config, and the run that it describes.

An experiment file has `config()`, which builds an `Experiment`, and `train(config, workdir)`, which
opens a run and trains it; `main(config, train)` makes a command of them.
"""

from lladax.experiment.command import chosen, main, run_command
from lladax.experiment.config import Experiment
from lladax.experiment.run import Run, heldout_hook, open_run, train, train_step, with_special_ids
from lladax.experiment.start import AtStep, Best, Latest, Start

__all__ = [
  "AtStep",
  "Best",
  "Experiment",
  "Latest",
  "Run",
  "Start",
  "chosen",
  "heldout_hook",
  "main",
  "open_run",
  "run_command",
  "train",
  "train_step",
  "with_special_ids",
]
