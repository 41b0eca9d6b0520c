"""Every GPU kernel becomes machine code for Hopper, ptxas and all, on a machine without a GPU."""

import json
import pathlib
import re
import subprocess
import sys

import gpu_toolkit
import pytest

from kernels_pallas import gpu


@pytest.mark.slow
@pytest.mark.skipif(gpu_toolkit.MISSING, reason=gpu_toolkit.REASON)
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_every_kernel_compiles_for_hopper(kind):
  script = pathlib.Path(__file__).parent / "gpu_compile.py"
  command = [sys.executable, script, kind]
  ran = subprocess.run(command, capture_output=True, text=True, env=gpu_toolkit.environment())
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


@pytest.mark.skipif(not gpu_toolkit.MISSING, reason="the plugin is there")
def test_without_the_plugin_the_error_names_it():
  with pytest.raises(ValueError, match="pip install jax-cuda12-plugin"):
    gpu.compile_only()
