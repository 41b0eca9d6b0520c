"""GPUs as targets: what a machine that has none needs to lower, compile and interpret kernels.

The kernels are spelled in what jax 0.10.2 to 0.12 have in common: `plgpu.kernel(out_type=,
scratch_types=)` under warpgroup semantics for Hopper, `pl.pallas_call` with `plt.CompilerParams`
and `lax.dot_general` for Triton. `op.target` is what lowers them for a GPU that is not here;
`compile_only` goes on to machine code. `op.interpret` runs them on a CPU: those in Triton's style
in every version, Mosaic's from 0.12 on.
"""

from __future__ import annotations

import math

import jax

from kernels_pallas import op

HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA H800", "NVIDIA H20")
# Multiprocessors to start blocks on where no device says how many: an H100's or H200's (SXM).
CORES = 132


def is_hopper() -> bool:
  """Whether the device that kernels are made for is one that `mosaic_gpu` kernels run on."""
  return op.target_device_kind().startswith(HOPPER)


def core_count() -> int:
  """Multiprocessors of the GPU that kernels are made for: the blocks of a persistent kernel."""
  device = jax.devices()[0]
  here = device.platform == "gpu" and device.device_kind == op.target_device_kind()
  return device.core_count if here else CORES


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


# Memory in bytes and its speed in bytes/s; the rest is the same chip (NVIDIA's data sheets, SXM).
_MEMORY = {
  "NVIDIA H100 80GB HBM3": (85_000_000_000, 3_350_000_000_000),
  "NVIDIA H200": (150_000_000_000, 4_800_000_000_000),
}
_HOPPER_CHIP = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{kind}"
"""


def compile_only(kind: str = "NVIDIA H100 80GB HBM3", count: int = 1) -> list[jax.Device]:
  """Devices to compile for, ptxas included, on a machine that has no GPU and no driver.

  Needs jax's CUDA plugin and ptxas: `pip install jax-cuda12-plugin jax-cuda12-pjrt
  nvidia-cuda-nvcc-cu12` (0.6 GB), the first two of jax's version. Shapes get a sharding over these
  devices, tracing happens inside `op.target(kind)`, and `lower(lowering_platforms=("cuda",))`
  gives what can be compiled. Nothing can be run.

  Raises:
    ValueError: for a kind that is not described here, or without the plugin.
  """
  if kind not in _MEMORY:
    raise ValueError(f"no description of {kind!r} to compile for; one of {tuple(_MEMORY)}")
  from jax.experimental import topologies

  memory, bandwidth = _MEMORY[kind]
  config = _HOPPER_CHIP.format(kind=kind, memory=memory, bandwidth=bandwidth)
  jax.devices()  # finds the plugin
  try:
    topology = topologies.get_topology_desc(
      platform="cuda", target_config=config, topology=f"1x{count}x1"
    )
  except Exception as error:
    raise ValueError(
      f"compiling for {kind!r} needs jax's CUDA plugin: pip install jax-cuda12-plugin"
      f"=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12 ({error})"
    ) from error
  return topology.devices
