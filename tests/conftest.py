"""Eight fake CPU devices for every test, and little optimisation; set before JAX is imported.

JAX_PLATFORMS=cuda in the environment leaves the GPU to tests/kernels/test_on_gpu.py.
"""

import gc
import os
import tempfile
from importlib import metadata

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
  flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in flags:
  # Most of a test's time is compilation.
  flags += " --xla_backend_optimization_level=0"
if "fusion_emitters" not in flags and metadata.version("jaxlib").startswith("0.10."):
  # Another emitter of fusions, which compiles in half the time; later versions have only one, and
  # refuse a flag that they do not know.
  flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = flags.strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # Many tests compile the same step; the processes of one run of pytest share what they compiled.
  compiled = tempfile.TemporaryDirectory(prefix="lladax_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Tracing makes many objects that live; looking through them all too often costs a tenth of the time.
gc.set_threshold(200_000, 50, 100)


def pytest_collection_finish():
  gc.freeze()  # modules and tests live to the end


def pytest_sessionfinish():
  gc.freeze()  # and pytest collects several times while it ends, which took it up to ten seconds


@pytest.fixture(autouse=True)
def checked_values():
  """Every test has JAX check over which mesh axes each value varies."""
  from lladax.sharding import checked

  with checked():
    yield


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
  """A folder of a small LLaDA-MoE with random weights and a tokenizer that has turns."""
  from small_models import save_chatty

  return save_chatty(tmp_path_factory.mktemp("chatty") / "model")
