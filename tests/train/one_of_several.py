"""One process of a run over several, each with two fake devices: `python one_of_several.py ...`."""

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax

from lladax.config import from_json
from lladax.experiment import open_run, train
from lladax.sharding import own_rows
from lladax.train import every


def main(address, processes: int, index: int, config: str, workdir: str, pause: float = 0.0):
  jax.distributed.initialize(address, processes, index)
  assert jax.device_count() == 2 * processes
  experiment = from_json(config)

  def say(step, state):
    # The experts' weights as they lie: which of the processes hold which.
    experts = state.params["layers"]["moe"]["down"]
    parts = sorted(str(shard.index[1]) for shard in experts.addressable_shards)
    said = {
      "step": step,
      "experts": parts,
      "rows": len(next(run.data.train_iterator(rows=rows)).tokens),
    }
    print(json.dumps(said), flush=True)
    time.sleep(pause)

  with open_run(experiment, workdir) as run:
    rows = own_rows(run.mesh, experiment.data.batch_size)
    train(run, hooks=[every(1, say)])


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6], float(sys.argv[6]))
