"""`python -m lladax.hub`: folder to store to folder, and errors in one line."""

import json
import subprocess
import sys

import pytest
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver
from folders import GOLDENS

from lladax.hub import __main__ as command
from lladax.hub.store import open_store

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()


def run(name, **values):
  """The command in this process; what it exits with, None where it is done."""
  with flagsaver.flagsaver(progress=False, **values):
    try:
      return command.main(["hub", name])
    except SystemExit as stop:
      return stop.code


def test_in_and_out_again_as_programs(tmp_path):
  source = GOLDENS / "lladamoe_tiny"
  python = [sys.executable, "-m", "lladax.hub"]
  store, out = f"--target={tmp_path / 'store'}", f"--target={tmp_path / 'out'}"
  done = subprocess.run(
    [*python, "import", f"--source={source}", store, "--mask_id=125"],
    check=True, capture_output=True, text=True,
  )  # fmt: skip
  assert done.stdout == f"wrote {tmp_path / 'store'}\n" and "100%" not in done.stdout
  subprocess.run([*python, "export", f"--source={tmp_path / 'store'}", out], check=True)
  for name in ("config.json", "model.safetensors"):
    want, got = (source / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
    assert json.loads(want) == json.loads(got) if name.endswith("json") else want == got


def test_dtype_and_shards_of_another_folder(tmp_path):
  out = tmp_path / "out"
  source = str(GOLDENS / "lladamoe_tiny")
  options = {"dtype": "bfloat16", "max_shard_size": 50_000, "mask_id": 125}
  assert run("export", source=source, target=str(out), **options) is None
  files = sorted(out.glob("*.safetensors"))
  assert len(files) > 2
  tensors = {k: x for file in files for k, x in safetensors.numpy.load_file(file).items()}
  assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}


def test_ids_of_the_command_line_are_those_of_the_model(tmp_path):
  target = str(tmp_path / "store")
  ids = {"mask_id": 3, "eos_id": 4, "pad_id": 5}
  assert run("import", source=str(GOLDENS / "llada2_moe"), target=target, **ids) is None
  config = open_store(target).config
  assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (3, 4, 5)


@pytest.mark.parametrize(
  "name, values, message",
  [
    ("import", {"source": "nowhere"}, "no folder 'nowhere'"),
    ("import", {"source": str(GOLDENS / "lladamoe_tiny")}, "or --mask_id on the command line"),
    ("import", {"source": str(GOLDENS / "dream"), "dtype": "float16"}, "float16 is for export"),
    ("export", {"source": str(GOLDENS / "dream"), "target": str(GOLDENS)}, "goldens exists"),
  ],
)
def test_errors_are_one_line(name, values, message, tmp_path):
  error = run(name, **{"target": str(tmp_path / "out"), **values})
  assert error.startswith("error: ") and message in error and "\n" not in error
  assert not list(tmp_path.iterdir())


def test_the_card_of_a_run_tells_how_it_was_trained_and_what_it_measured(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  config = {"steps": 300, "model": {"hidden_size": 8}, "optimizer": {"learning_rate": 0.001}}
  (workdir / "config.json").write_text(json.dumps(config))
  records = [
    {"step": 100, "heldout/bits_per_byte": 3.0},
    {"step": 200, "heldout/bits_per_byte": 2.34567},
    {"step": 300, "loss": 1.0},
  ]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  training, measured = command.run_record(workdir)
  assert training == {"steps": 300, "optimizer.learning_rate": 0.001}
  assert measured == {"after step": 200, "heldout/bits_per_byte": 2.3457}
  (workdir / "checkpoints" / "200").mkdir(parents=True)
  assert command.run_record(workdir / "checkpoints" / "200") == (training, measured)
  assert command.run_record(tmp_path) == ({}, {})
