"""Where jax 0.10.2 to 0.12 differ for Pallas kernels on a GPU, in one place.

Lowering for CUDA on a machine that has no GPU asks newer versions for a device to lower for
(`lowering_for`), and numerics there come from interpreters (`interpreted`): Pallas's own for kernels
in Triton's style in every version, Mosaic's for Hopper kernels from 0.12 on.
"""

from __future__ import annotations

import contextlib
import contextvars

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

# Multiprocessors that are lowered for when there is no device to ask: both have 132 (SXM).
HOPPER = {"NVIDIA H100 80GB HBM3": 132, "NVIDIA H200": 132}

_interpreting = contextvars.ContextVar("interpreting", default=False)


def lowering_for(kind: str = "NVIDIA H100 80GB HBM3", cores: int = 132):
  """A context in which `lower(lowering_platforms=("cuda",))` works on a machine without a GPU.

  Args:
    kind: what `jax.Device.device_kind` would say.
    cores: the number of multiprocessors.
  """
  device = AbstractDevice(kind, cores, "gpu")
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@contextlib.contextmanager
def interpreted():
  """A context in which GPU kernels that are traced run step by step on the CPU: slow, for tests.

  Raises:
    NotImplementedError: by Mosaic kernels under a jax that has no interpreter for them (< 0.12).
  """
  token = _interpreting.set(True)
  try:
    yield
  finally:
    _interpreting.reset(token)


def interpreting() -> bool:
  return _interpreting.get()


def mosaic_interpreter():
  """What `plgpu.kernel(interpret=)` takes: parameters of the interpreter, or None to compile."""
  if not interpreting():
    return None
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not hasattr(plgpu, "InterpretGPUParams"):
    raise NotImplementedError(
      f"jax {jax.__version__} cannot interpret Mosaic GPU kernels on a CPU; 0.12 and newer can"
    )
  return plgpu.InterpretGPUParams(detect_races=True)


def core_count() -> int:
  """Multiprocessors of the GPU that is lowered for: how many blocks a persistent kernel starts."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "gpu" and device.num_cores:
    return device.num_cores
  return getattr(jax.devices()[0], "core_count", None) or 132
