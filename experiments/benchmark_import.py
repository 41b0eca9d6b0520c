"""Import of a checkpoint: host memory beside the model, and speed.

A folder of bfloat16 tensors with the true names and shapes of LLaDA-MoE-7B-A1B is written, with
fewer layers, and read in processes of their own: into one device (from the disk, then again from
the system's cache of it), into 8 fake devices with experts and width sharded, and into a store on
disk. Memory is the resident set of the process,
sampled every few milliseconds, less what it was before and less the arrays that are already
delivered: on a CPU they lie in the same memory. The bound is 1.3 x the largest stacked parameter.
The folder's pages are dropped from the cache before each reading, where the system allows.

  python -m experiments.benchmark_import --layers=2

Measured on 2 cores of an AMD EPYC (virtual machine; its disk reads 0.34 GB/s and writes 0.23 GB/s),
2.97 GB of weights, largest stacked parameter 1.07 GB (gate_up of 2 layers):

  load                 7.9 s  0.37 GB/s  host memory 1.11 x the largest parameter
  load from cache      4.9 s  0.61 GB/s              1.12 x
  load on 8 devices    4.7 s  0.64 GB/s              1.11 x
  import              14.2 s  0.21 GB/s              0.77 x
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import threading
import time
from dataclasses import replace

from absl import app, flags

from lladax.hub.families import family_for
from lladax.hub.layout import lay_out, write_headers
from lladax.hub.plan import abstract, named_leaves, tensor_shapes
from lladax.models import ModelConfig, llada_moe_7b_a1b

FLAGS = flags.FLAGS
flags.DEFINE_integer("layers", 2, "Layers of the synthetic checkpoint; the model has 16.")
flags.DEFINE_string("folder", None, "Where there is room for it, twice; default: the system's.")
flags.DEFINE_list(
  "ways", ["load", "load from cache", "load on 8 devices", "import"], "What to measure."
)
flags.DEFINE_string("json", None, "File to write the results to.")

SHARD = 5_000_000_000  # bytes, as published
FACTOR = 1.3


def model(layers: int) -> ModelConfig:
  return replace(llada_moe_7b_a1b(), num_hidden_layers=layers, param_dtype="bfloat16")


def write_checkpoint(folder: pathlib.Path, config: ModelConfig):
  """A folder of that config; the weights are normal numbers, repeated with another beginning."""
  import ml_dtypes
  import numpy as np

  family = family_for(config)
  shapes = tensor_shapes(family.rows(config), named_leaves(abstract(config)))
  layout = lay_out(shapes, dict.fromkeys(shapes, "BF16"), SHARD)
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(family.hf_config(config)))
  layout = write_headers(folder, layout, {"format": "pt"})
  block = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(ml_dtypes.bfloat16)
  data = memoryview(np.concatenate([block, block]).view(np.uint8))
  for number, tensor in enumerate(layout.tensors.values()):
    with open(folder / tensor.file, "r+b", buffering=0) as file:
      file.seek(tensor.start)
      begin, left = 2 * (number * 7919 % block.size), tensor.nbytes
      while left:
        left -= file.write(data[begin : begin + min(left, block.nbytes)])


def drop_from_cache(folder: pathlib.Path):
  for path in folder.glob("*.safetensors"):
    with open(path, "rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory:
  """Peak of resident memory less `delivered`, since `with` was entered.

  Attributes:
    peak: bytes.
    delivered: bytes of the arrays that are finished; the caller adds to it.
  """

  def __init__(self, every: float = 0.005):
    self.peak, self.delivered, self._every, self._stop = 0, 0, every, threading.Event()

  def __enter__(self):
    self._before = self._resident()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exception):
    self._stop.set()
    self._thread.join()

  def _watch(self):
    while not self._stop.wait(self._every):
      # In this order: what is delivered in between was resident before.
      delivered, resident = self.delivered, self._resident()
      self.peak = max(self.peak, resident - delivered - self._before)

  @staticmethod
  def _resident() -> int:
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(way: str, folder: str, pipe):
  """One way of reading, in a process of its own; sends (seconds, peak bytes)."""
  if way == "load on 8 devices":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  from lladax.hub import load
  from lladax.hub.store import import_to
  from lladax.sharding import MeshConfig, make_mesh

  jax.block_until_ready(jax.numpy.zeros(1) + 1)
  memory = Memory()

  class Counted(load.HostParts):
    def to_devices(self):
      size = sum(buffer.nbytes for buffer in self.buffers.values())
      array = super().to_devices()
      memory.delivered += size
      return array

  load.HostParts = Counted
  target = f"{folder}.store"
  with memory:
    start = time.perf_counter()
    if way == "import":
      import_to(folder, target, progress=False)
    else:
      mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4)) if "8" in way else None
      jax.block_until_ready(load.load_folder(folder, mesh=mesh, progress=False).params)
    seconds = time.perf_counter() - start
  shutil.rmtree(target, ignore_errors=True)
  pipe.send((seconds, memory.peak))


def run(folder: pathlib.Path):
  config = model(FLAGS.layers)
  write_checkpoint(folder, config)
  leaves = named_leaves(abstract(config))
  stacked = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in leaves.items()}
  largest = max(stacked, key=stacked.get)
  total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
  print(
    f"{total / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards; largest stacked"
  )
  print(f"parameter {largest}: {stacked[largest] / 1e9:.2f} GB")
  results = []
  context = multiprocessing.get_context("spawn")
  for way in FLAGS.ways:
    if way != "load from cache":
      drop_from_cache(folder)
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(way, str(folder), theirs))
    process.start()
    theirs.close()
    seconds, peak = ours.recv()
    process.join()
    ratio = peak / stacked[largest]
    results.append({"way": way, "seconds": seconds, "peak_bytes": peak, "ratio": ratio})
    verdict = "within" if ratio < FACTOR else "MORE THAN"
    print(
      f"{way:18s} {seconds:6.1f} s  {total / seconds / 1e9:5.2f} GB/s  host memory "
      f"{peak / 1e9:5.2f} GB = {ratio:.2f} x the largest parameter ({verdict} {FACTOR})",
      flush=True,
    )
  if FLAGS.json:
    pathlib.Path(FLAGS.json).write_text(json.dumps(results, indent=1))


def main(_):
  with tempfile.TemporaryDirectory(dir=FLAGS.folder) as place:
    run(pathlib.Path(place) / "checkpoint")


if __name__ == "__main__":
  app.run(main)
