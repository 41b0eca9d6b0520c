"""Where jax 0.10.2 to 0.12 differ for Pallas kernels on a GPU, in one place.

The kernels are spelled in what these versions have in common: `plgpu.kernel(out_type=,
scratch_types=)` under warpgroup semantics for Hopper, `pl.pallas_call` with `plt.CompilerParams`
and `lax.dot_general` for Triton. Left is this. To lower for CUDA on a machine that has no GPU,
newer versions ask what to lower for (`lowering_for`). And `op.interpret()` runs kernels on a CPU:
those in Triton's style in every version, Mosaic's from 0.12 on.
"""

from __future__ import annotations

import contextlib
import math

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import op

HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA H800", "NVIDIA H20")
# Multiprocessors to start blocks on where no device says how many: an H100's or H200's (SXM).
CORES = 132


@contextlib.contextmanager
def lowering_for(kind: str = "NVIDIA H100 80GB HBM3", cores: int = CORES):
  """A context in which `lower(lowering_platforms=("cuda",))` works on a machine without a GPU.

  Args:
    kind: what `device_kind` of the device would say.
    cores: the number of its multiprocessors.
  """
  device = AbstractDevice(kind, cores, "gpu")
  with op.target(kind), use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    yield


def is_hopper() -> bool:
  """Whether the device that kernels are made for is one that `mosaic_gpu` kernels run on."""
  return op.target_device_kind().startswith(HOPPER)


def core_count() -> int:
  """Multiprocessors of the GPU that is lowered for: how many blocks a persistent kernel starts."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "gpu" and device.num_cores:
    return device.num_cores
  return getattr(jax.devices()[0], "core_count", None) or CORES


def check_offsets(*arrays) -> None:
  """Raises a ValueError for arrays that Triton kernels cannot address: 32 bits with a sign."""
  for array in arrays:
    if math.prod(array.shape) > 1 << 31:
      raise ValueError(
        f"Triton kernels address up to 2**31 numbers of an array, got {array.shape}: hold less on "
        "each device, or multiply by implementation='mosaic_gpu'"
      )


def mosaic_interpreter():
  """What `plgpu.kernel(interpret=)` takes: None to compile, or its interpreter with race detection.

  Raises:
    NotImplementedError: where kernels are interpreted under a jax that cannot do that.
  """
  if not op.interpreted():
    return None
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not hasattr(plgpu, "InterpretGPUParams"):
    raise NotImplementedError(
      f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels; 0.12 and newer do"
    )
  return plgpu.InterpretGPUParams(detect_races=True)
