"""The launchers say what they would run; on one box they run it."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
RUN = ["--", "experiments.tiny_text", "--workdir=gs://bucket/a run", "--set=optimizer.peak=1e-3"]
OPTIONS = {
  "one_box.sh": ["--processes=2"],
  "tpu_vm.sh": ["--name=slice", "--zone=z", "--repository=https://host/lladax", "--revision=abc"],
  "gke.sh": ["--cluster=c", "--tpu_type=v5p-128", "--slices=2"],
  "slurm.sh": ["--nodes=4", "--partition=p"],
}
# The program that each of them calls.
CALLS = {"one_box.sh": "python", "tpu_vm.sh": "gcloud", "gke.sh": "xpk", "slurm.sh": "sbatch"}


def launch(script, *arguments, path=None):
  environment = os.environ | ({} if path is None else {"PATH": f"{path}:{os.environ['PATH']}"})
  return subprocess.run(
    [LAUNCH / script, *arguments], capture_output=True, text=True, env=environment
  )


def test_every_launcher_is_here():
  assert {path.name for path in LAUNCH.glob("*.sh")} - {"read_options.sh"} == set(OPTIONS)


RECORDER = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
text = sys.stdin.read() if name == "sbatch" else ""
with open({calls!r}, "a") as file:
  file.write(json.dumps([name, *sys.argv[1:], text]) + chr(10))
if name in ("nohup", "srun"):
  rest = [word for word in sys.argv[1:] if word != "--kill-on-bad-exit=1"]
  os.execvp(rest[0], rest)
"""


@pytest.fixture
def stand_ins(tmp_path):
  """(folder of programs that only record how they are called, () -> their calls)."""
  folder, calls = tmp_path / "bin", tmp_path / "calls"
  folder.mkdir()
  for name in (*CALLS.values(), "git", "pip", "pkill", "nohup", "sleep", "srun", "scontrol"):
    text = RECORDER.format(python=sys.executable, calls=str(calls))
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  return folder, lambda: [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("script", OPTIONS)
def test_a_dry_run_prints_what_runs_and_runs_nothing(script, stand_ins, tmp_path):
  done = launch(script, *OPTIONS[script], "--dry_run", *RUN, path=stand_ins[0])
  assert done.returncode == 0, done.stderr
  assert {call[0] for call in stand_ins[1]()} <= {"git"} if (tmp_path / "calls").exists() else True
  assert CALLS[script] in done.stdout and "experiments.tiny_text" in done.stdout
  assert all(option.partition("=")[2] in done.stdout for option in OPTIONS[script])


@pytest.mark.parametrize("script", OPTIONS)
def test_every_host_gets_the_experiments_flags_as_they_were(script, stand_ins, tmp_path):
  folder, calls = stand_ins
  done = launch(script, *OPTIONS[script], *RUN, path=folder)
  assert done.returncode == 0, done.stderr
  if script != "one_box.sh":  # run what the hosts are sent
    (call,) = [call for call in calls() if call[0] == CALLS[script]]
    commands = [word.partition("=")[2] for word in call if word.startswith("--command=")]
    (tmp_path / "home" / "lladax").mkdir(parents=True)
    subprocess.run(
      ["bash", "-c", commands[0] if commands else call[-1]], check=True, capture_output=True,
      env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    deadline = time.monotonic() + 10  # tpu_vm.sh leaves it in the background
    while not any(call[0] == "python" for call in calls()):
      assert time.monotonic() < deadline
      time.sleep(0.05)
  hosts = [call[1:-1] for call in calls() if call[0] == "python"]
  assert len(hosts) == (2 if script == "one_box.sh" else 1)
  for words in hosts:
    assert words[:3] == ["-m", "experiments.tiny_text", "--distributed"]
    assert words[-2:] == RUN[2:]


@pytest.mark.parametrize("script", OPTIONS)
@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--nmae=x", *RUN], "no option --nmae; there are:"),
    (["name", *RUN], "name: expected --name=value"),
    ([], "is missing|nothing to run"),
  ],
)
def test_mistakes_are_one_line(script, arguments, message):
  done = launch(script, *arguments)
  assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
  assert any(part in done.stderr for part in message.split("|")), done.stderr


@pytest.mark.parametrize("script", OPTIONS)
def test_help_has_an_example_and_every_option(script):
  done = launch(script, "--help")
  assert done.returncode == 0 and f"experiments/launch/{script}" in done.stdout
  source = (LAUNCH / script).read_text()
  options = source.split('options="')[1].split('"')[0].split()
  assert all(f"--{option}" in done.stdout for option in options)


def test_one_box_starts_again_after_a_crash_and_not_after_a_mistake(tmp_path):
  (tmp_path / "python").write_text(f"#!/bin/sh\necho x >> {tmp_path}/runs\nexit $STATUS\n")
  (tmp_path / "python").chmod(0o755)
  for status, runs in (("9", 3), ("2", 1), ("0", 1)):
    (tmp_path / "runs").write_text("")
    done = subprocess.run(
      [LAUNCH / "one_box.sh", "--restarts=2", *RUN],
      env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": status},
      capture_output=True,
    )
    assert done.returncode == int(status)
    assert (tmp_path / "runs").read_text().count("x") == runs
