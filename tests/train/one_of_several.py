"""One process of a run over several, each with two fake devices: `python one_of_several.py ...`."""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

from lladax.config import from_json
from lladax.experiment import open_run, train
from lladax.train import every


def main(address: str, processes: int, index: int, config: str, workdir: str):
  jax.distributed.initialize(address, processes, index)
  assert jax.device_count() == 2 * processes
  experiment = from_json(config)

  def say(step, state):
    # The experts' weights as they lie: which of the processes hold which.
    experts = state.params["layers"]["moe"]["down"]
    parts = sorted(str(shard.index[1]) for shard in experts.addressable_shards)
    print(json.dumps({"step": step, "experts": parts}), flush=True)

  with open_run(experiment, workdir) as run:
    train(run, hooks=[every(1, say)])


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
