"""A toy run on one device, to be killed: `python chaos_run.py CONFIG_JSON WORKDIR [FILE_LIMIT]`.

FILE_LIMIT is the size in bytes at which writing to a file fails, as on a disk that is full.
"""

import os
import resource
import signal
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from lladax.config import from_json
from lladax.experiment import run_command
from lladax.experiment import train as train_run
from lladax.experiment.run import open_run
from lladax.train import every


def train(config, workdir):
  with open_run(config, workdir) as run:
    print("open", flush=True)
    train_run(run, [every(1, lambda step, state: time.sleep(0.05))])


def main(config: str, workdir: str, file_limit: str = ""):
  if file_limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), resource.RLIM_INFINITY))
  config = from_json(config)
  sys.exit(run_command(config, {"train": train}, workdir=workdir, assignments=[], mode="train"))


if __name__ == "__main__":
  main(*sys.argv[1:])
