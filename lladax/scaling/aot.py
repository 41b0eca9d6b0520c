"""Compiling for a slice of TPUs that is not here: libtpu, its topologies, its messages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import warnings

import jax

from lladax.config import ConfigError
from lladax.scaling.chips import GIB, Slice

INSTALL = "pip install -e '.[plan]'"
# Without them libtpu asks a metadata server which machine this is, and says so for a while.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}
TOO_MUCH = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
TOO_MUCH_TEMPORARY = re.compile(
  r"memory required for [\w ]*? \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
)


class DoesNotFit(Exception):
  """The compiler found no place in HBM for the program.

  Attributes:
    needed: bytes on a device.
    available: bytes that a program can have.
  """

  def __init__(self, needed: float, available: float):
    super().__init__(f"needs {needed / GIB:.2f} GiB of {available / GIB:.2f} GiB")
    self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """What a compiled program says of itself, per device.

  Attributes:
    text: its HLO.
    arguments, outputs, aliased, temporaries, code: bytes.
    peak: bytes, the most that is alive at any time; less than all of them together.
  """

  text: str
  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  peak: int

  @property
  def held(self) -> int:
    """Bytes that the program holds while it runs."""
    return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def require_libtpu() -> str:
  """The version of libtpu, if it is the one that the installed jax was built with.

  Raises:
    ConfigError: if there is none, or another.
  """
  jax_version = importlib.metadata.version("jax")
  pinned = pinned_libtpu(importlib.metadata.requires("jax") or [])
  try:
    version = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    raise ConfigError(f"planning for TPUs needs libtpu, their compiler: {INSTALL}") from None
  if pinned and not (version + ".").startswith(pinned + "."):
    raise ConfigError(
      f"libtpu {version} does not belong to jax {jax_version}, which pins {pinned}.*: with another "
      "one Pallas kernels fail to compile, or plans are of a program that will not run; "
      f"pip install 'libtpu=={pinned}.*'"
    )
  return version


def pinned_libtpu(requirements: list[str]) -> str | None:
  """`libtpu==0.0.42.*; extra == "tpu"` among jax's requirements -> "0.0.42"."""
  found = [re.match(r"libtpu\s*==\s*([\d.]+?)(?:\.\*)?\s*(?:;|$)", text) for text in requirements]
  return next((match[1] for match in found if match), None)


def use_cpu():
  """Lets JAX run on CPUs only, so that planning takes no accelerator of the machine it runs on."""
  jax.config.update("jax_platforms", "cpu")


def devices(slice_: Slice) -> list:
  """The devices of a slice: descriptions, on which nothing can run.

  Raises:
    ConfigError: without the right libtpu, or for a slice that it does not know.
  """
  require_libtpu()
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name)
  except Exception as error:  # libtpu's own, of no common class
    reason = " ".join(str(error).split())
    raise ConfigError(f"libtpu knows no topology {slice_.name}: {reason}") from error
  return list(topology.devices)


def compile_lowered(lowered, options: dict | None = None) -> Compiled:
  """Compiles for the topology that the shardings of `lowered` lie on.

  Raises:
    DoesNotFit: if it needs more memory than a device has.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      compiled = lowered.compile(compiler_options=options)
  except Exception as error:  # XlaRuntimeError, JaxRuntimeError: by version
    raise _explain(error) from error
  memory = compiled.memory_analysis()
  return Compiled(
    text=compiled.as_text(),
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
  )


def _explain(error: Exception) -> Exception:
  text = " ".join(str(error).split())
  for pattern in (TOO_MUCH, TOO_MUCH_TEMPORARY):
    found = pattern.search(text)
    if found:
      return DoesNotFit(_bytes(found[1], found[2]), _bytes(found[3], found[4]))
  if "RESOURCE_EXHAUSTED" in text or "vmem" in text.lower():
    return ConfigError(f"the compiler ran out of memory of the chip: {text[:400]}")
  return ConfigError(f"the compiler refused the program: {text[:400]}")


def _bytes(number: str, unit: str) -> float:
  return float(number) * 1024 ** ("KMGT".index(unit) + 1)
