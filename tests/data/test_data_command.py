"""python -m lladax.data: what it prints, its exit status, its progress."""

import io
import json
import os
import pathlib
import subprocess
import sys

from lladax.data import __main__ as command_module
from lladax.data.__main__ import ProgressBar, ProgressLines
from lladax.data.manifest import read_manifest
from lladax.data.prepare import Progress

REPOSITORY = pathlib.Path(__file__).parents[2]


def run(*arguments):
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  return subprocess.run(
    [sys.executable, "-m", "lladax.data", *map(str, arguments)],
    capture_output=True,
    text=True,
    env=environment,
  )


def call(capsys, *arguments):
  """`main` in this process: its exit status and output."""
  status = command_module.main([str(argument) for argument in arguments])
  printed = capsys.readouterr()
  return status, printed.out + printed.err


def test_prepare_and_verify(tmp_path, capsys):
  source, target = tmp_path / "c.jsonl", tmp_path / "out"
  source.write_text("".join(json.dumps({"body": f"text {i} " * 9}) + "\n" for i in range(300)))
  flags = ["prepare", f"--source={source}", f"--target={target}", "--length=128", "--workers=1",
           "--text_field=body", "--heldout=0.1", "--unit_bytes=8000", "--packing=best_fit"]  # fmt: skip
  made = run(*flags)
  assert made.returncode == 0, made.stderr
  assert "tokens/s per core" in made.stdout and "documents held out" in made.stdout
  manifest = read_manifest(target)
  assert manifest.recipe["packing"]["class"].endswith("BestFit") and len(manifest.train) > 2

  (target / manifest.train[1].name).unlink()
  code, printed = call(capsys, "verify", target)
  assert code == 1
  assert manifest.train[1].name in printed and "1 problem\n" in printed
  code, printed = call(capsys, *flags[:-1])
  assert code == 1 and printed.startswith("error: ") and "other options (packing" in printed


def test_inspect_and_verify_of_a_folder(tmp_path, capsys):
  source, target = tmp_path / "t.txt", tmp_path / "out"
  source.write_text("one|two|three")
  code, printed = call(
    capsys, "prepare", f"--source={source}", f"--target={target}", "--workers=1",
    "--length=8", "--separator=|", "--heldout=0.0001", "--no-progress",
  )  # fmt: skip
  assert code == 0 and "no document is held out" in printed
  code, printed = call(capsys, "inspect", target)
  assert code == 0 and "documents" in printed and "<|endoftext|>" in printed
  assert call(capsys, "verify", target) == (0, f"{target}: no problems\n")
  code, printed = call(capsys, "verify", tmp_path / "absent")
  assert code == 1 and "absent: does not exist" in printed


def test_check_counts_conversations(tmp_path, capsys):
  path = tmp_path / "c.jsonl"
  turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
  path.write_text(json.dumps({"messages": turns}) + "\n")
  code, printed = call(capsys, "check", path)
  assert code == 0 and "1 conversation" in printed
  path.write_text(json.dumps({"messages": turns[1:]}) + "\n")
  code, printed = call(capsys, "check", path)
  assert code == 1 and f"{path}:1" in printed


PROGRESS = Progress(stage="rows", done=40, total=80, tokens=900, seconds=3.0, workers=2)


def test_a_line_now_and_then(monkeypatch, capsys):
  lines = ProgressLines()
  lines(PROGRESS)
  assert capsys.readouterr().err == ""  # nothing in the first ten seconds
  lines._next = 0
  lines(PROGRESS)
  assert capsys.readouterr().err == "preparing 50.0%, 150 tokens/s per core\n"
  assert lines.last == PROGRESS


def test_a_bar_on_a_terminal(monkeypatch):
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setenv("TERM", "xterm")
  bar = ProgressBar()
  bar(PROGRESS)
  bar._bar.refresh()
  bar.close()
  assert "preparing" in screen.getvalue() and "150 tokens/s per core" in screen.getvalue()
