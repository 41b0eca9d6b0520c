"""The command's mistakes end in one line and status 2; the arithmetic of messages."""

import importlib.metadata
import json
import subprocess
import sys

import jax
import pytest

from lladax import plan as command_module
from lladax.config import ConfigError
from lladax.experiment.rates import supervised_share
from lladax.plan import Options, arranged, command, experiment_named
from lladax.scaling import aot
from lladax.scaling.chips import parse_slice
from lladax.scaling.sweep import exchange_named
from lladax.sharding import MeshConfig

SMALL = ("model.dtype=bfloat16", "data.length=128", "data.batch_size=64")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
  """Mistakes are found before anything is compiled: on eight CPU devices in place of a slice."""
  monkeypatch.setattr(aot, "require_libtpu", lambda: "0")
  monkeypatch.setattr(aot, "use_cpu", lambda: None)
  monkeypatch.setattr(aot, "devices", lambda slice_: jax.devices()[: slice_.devices])


@pytest.mark.parametrize(
  "options, part",
  [
    ({"topology": None}, "--topology is missing"),
    ({"experiment": None}, "--experiment is missing"),
    ({"experiment": "tiny_txt"}, "tiny_text"),
    ({"experiment": "experiments.benchmark_import"}, "no config()"),
    ({"topology": "v5p:3x3x3"}, "2x2x1, 2x2x2"),
    ({"topology": "v4:2x2x1"}, "v5e, v5p, v6e, tpu7x"),
    ({"mesh": "fsdp=3"}, "these fit: fsdp=1,expert=8"),
    ({"mesh": "fsdp=16,expert=4"}, "a mesh of 64 devices, and v5e:2x4 has 8"),
    ({"mesh": "fsdb=8"}, "did you mean 'fsdp'"),
    ({"mesh": "fsdp=8", "exchange": "Rng"}, "no exchange 'Rng'; one of"),
    ({"set": ("data.batch_size=12",)}, "does not divide by the 8 devices"),
    ({"set": ("model.hidden_sizes=8",)}, "hidden_size"),
    (
      {"mesh": "expert=8", "exchange": "Ring", "set": (*SMALL, "model.moe.num_experts=6")},
      "6 experts do not divide over 8 devices",
    ),
    ({"decode": True, "rows": ("a",)}, "--rows are whole numbers"),
    ({"decode": True, "rows": ("0",)}, "at least one row"),
    ({"decode": True, "exchange": "Fsdp"}, "leave --exchange"),
    ({"decode": True, "weights": "int4"}, "one of int8, fp8; got 'int4'"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(options, part, capsys):
  values = {"experiment": "tiny_text", "topology": "v5e:2x4", "set": SMALL} | options
  assert command(Options(**values)) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: ")
  assert part in error


def test_arguments_without_table(capsys):
  assert command(Options(), ["what"]) == 2
  assert command(Options(table=True)) == 2
  assert "experiment@topology" in capsys.readouterr().err


def test_the_rule_chooses_and_is_overridden():
  config, slice_ = experiment_named("pretrain_llada_moe"), parse_slice("v5p:4x4x4")
  chosen, why = arranged(config, slice_, None, None)
  assert type(chosen.model.moe.exchange).__name__ == "Fsdp"
  assert (chosen.mesh.fsdp, chosen.mesh.expert, chosen.mesh.data) == (16, 4, 1)
  assert "from 4,074 tokens" in why
  ring, _ = arranged(config, slice_, "fsdp=4,expert=16", "Ring")
  assert ring.model.moe.exchange == exchange_named("Ring")
  assert (ring.mesh.fsdp, ring.mesh.expert) == (4, 16)


def test_half_of_the_tokens_are_supervised():
  assert supervised_share(experiment_named("pretrain_llada_moe")) == pytest.approx(0.5, rel=0.01)


def test_the_paper_s_stage():
  config = experiment_named("pretrain_llada_moe")
  assert config.model.rope_theta == 10_000
  assert (config.data.length, config.objective.balance_loss, config.objective.z_loss) == (
    4096,
    0.01,
    0.001,
  )
  tokens = config.steps * config.data.batch_size * config.data.length
  assert tokens == pytest.approx(10e12, rel=1e-4)
  assert config.model.param_dtype == "float32"


# --- libtpu ---


def test_the_pin_among_jax_s_requirements():
  lines = ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"', 'requests; extra == "tpu"']
  assert aot.pinned_libtpu(lines) == "0.0.42"
  assert aot.pinned_libtpu(["libtpu==0.0.50"]) == "0.0.50"
  assert aot.pinned_libtpu(["numpy"]) is None
  assert aot.pinned_libtpu(importlib.metadata.requires("jax")) is not None


@pytest.fixture
def installed(monkeypatch):
  monkeypatch.undo()

  def install(version):
    def find(name):
      if name != "libtpu":
        return "0.10.2"
      if version is None:
        raise importlib.metadata.PackageNotFoundError(name)
      return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["libtpu==0.0.42.*; extra"])

  return install


def test_no_libtpu(installed):
  installed(None)
  with pytest.raises(ConfigError, match=r"pip install -e '.\[plan\]'"):
    aot.require_libtpu()


def test_another_libtpu_is_refused_with_the_reason(installed):
  installed("0.0.52.1")
  with pytest.raises(ConfigError, match="which pins 0.0.42.*Pallas kernels fail"):
    aot.require_libtpu()
  installed("0.0.420")
  with pytest.raises(ConfigError):
    aot.require_libtpu()
  installed("0.0.42.1")
  assert aot.require_libtpu() == "0.0.42.1"


@pytest.mark.parametrize(
  "text, needed, available",
  [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.65G of 15.75G hbm.", 16.65,
     15.75),
    ("E1000: Ran out of memory on HBM, the total memory required for HLO temporaries (1.5T) exceeds"
     " available HBM (95.73G). HLO module: jit_f.", 1536, 95.73),
  ],
)  # fmt: skip
def test_messages_of_too_little_memory(text, needed, available):
  error = aot._explain(RuntimeError(text))
  assert isinstance(error, aot.DoesNotFit)
  assert error.needed / (1 << 30) == pytest.approx(needed)
  assert error.available / (1 << 30) == pytest.approx(available)


def test_another_error_of_the_compiler_is_shown():
  assert "no such thing" in str(aot._explain(RuntimeError("no such\nthing")))


# --- As one types it ---


def test_the_command_itself():
  found = subprocess.run(
    [sys.executable, "-m", "lladax.plan", "--experiment=tiny_text", "--topology=v5e:9x9"],
    capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  assert found.returncode == 2
  assert found.stderr.strip().splitlines()[-1].startswith("error: there is no slice 'v5e:9x9'")
  assert "Traceback" not in found.stderr


def test_json_that_cannot_be_written(tmp_path):
  with pytest.raises(ConfigError, match="cannot write"):
    command_module.write(str(tmp_path / "no" / "plan.json"), json.dumps({}))
  assert MeshConfig(data=1).fsdp == 1
