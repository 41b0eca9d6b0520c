"""Every GPU kernel becomes machine code for Hopper, ptxas and all, on a machine without a GPU."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from kernels_pallas import gpu


def find_toolkit() -> str | None:
  """Where ptxas is; None: not installed."""
  if importlib.util.find_spec("nvidia") is None:
    return None
  found = importlib.util.find_spec("nvidia.cuda_nvcc")
  return found and list(found.submodule_search_locations)[0]


without_compiler = not (find_toolkit() and importlib.util.find_spec("jax_cuda12_plugin"))


@pytest.mark.slow
@pytest.mark.skipif(
  without_compiler,
  reason="needs jax's CUDA plugin and ptxas (0.6 GB, no GPU): pip install jax-cuda12-plugin"
  f"=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12",
)
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_every_kernel_compiles_for_hopper(kind):
  script, toolkit = pathlib.Path(__file__).parent / "gpu_compile.py", find_toolkit()
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit}",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "PATH": f"{toolkit}/bin:{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")]),
  }
  command = [sys.executable, script, kind]
  ran = subprocess.run(command, capture_output=True, text=True, env=env)
  said = ran.stdout + ran.stderr
  assert ran.returncode == 0, ran.stderr[-2000:]
  rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
  assert not [row for row in rows if "error" in row]
  assert len(rows) > 10
  # Mosaic's registers hold what they must: no more than a few words are spilled.
  spills = re.findall(r"(\d+) bytes spill stores", said)
  assert len(spills) >= 4 and max(map(int, spills)) <= 64, spills
  assert "(C7510)" not in said  # wgmma that the compiler had to serialise


def test_a_gpu_that_is_not_described():
  with pytest.raises(ValueError, match="'NVIDIA B200' to compile for; one of .*H100"):
    gpu.compile_only("NVIDIA B200")


@pytest.mark.skipif(not without_compiler, reason="the plugin is there")
def test_without_the_plugin_the_error_names_it():
  with pytest.raises(ValueError, match="pip install jax-cuda12-plugin"):
    gpu.compile_only()
