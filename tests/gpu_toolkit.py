"""What compiling for GPUs needs on a machine without one."""

import importlib.util
import os
import pathlib

import jax


def find_toolkit() -> str | None:
  """Where ptxas is; None: not installed."""
  if importlib.util.find_spec("nvidia") is None:
    return None
  found = importlib.util.find_spec("nvidia.cuda_nvcc")
  return found and list(found.submodule_search_locations)[0]


MISSING = not (find_toolkit() and importlib.util.find_spec("jax_cuda12_plugin"))
REASON = (
  "needs jax's CUDA plugin and ptxas (0.6 GB, no GPU): pip install jax-cuda12-plugin"
  f"=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12"
)


def environment() -> dict[str, str]:
  """Of a process that compiles; it may import what stands in tests/ and in the root."""
  toolkit, tests = find_toolkit(), pathlib.Path(__file__).parent
  path = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit}",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "PATH": f"{toolkit}/bin:{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join(path),
  }
