"""python -m lladax.data: what it prints, its exit status, its progress."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

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


def call(monkeypatch, capsys, *arguments):
  """`main` in this process: its output and exit status."""
  command_module.FLAGS.unparse_flags()
  left = command_module.FLAGS(["lladax.data", *map(str, arguments)])
  with pytest.raises(SystemExit) as end:
    command_module.main(left)
  command_module.FLAGS.unparse_flags()
  return end.value.code, capsys.readouterr().out


def test_prepare_and_verify(tmp_path, monkeypatch, capsys):
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
  code, printed = call(monkeypatch, capsys, "verify", target)
  assert code == 1
  assert manifest.train[1].name in printed and "1 problem\n" in printed
  code, _ = call(monkeypatch, capsys, *flags[:-1], "--packing=stream", "--workers=1")
  assert code.startswith("error: ") and "other options (packing" in code


def test_inspect_and_verify_of_a_folder(tmp_path, monkeypatch, capsys):
  source, target = tmp_path / "t.txt", tmp_path / "out"
  source.write_text("one|two|three")
  code, printed = call(
    monkeypatch, capsys, "prepare", f"--source={source}", f"--target={target}", "--workers=1",
    "--length=8", "--separator=|", "--heldout=0.0001", "--noprogress", "--packing=stream",
    "--text_field=text", "--unit_bytes=100000",
  )  # fmt: skip
  assert code == 0 and "no document is held out" in printed
  code, printed = call(monkeypatch, capsys, "inspect", target)
  assert code == 0 and "documents" in printed and "<|endoftext|>" in printed
  assert call(monkeypatch, capsys, "verify", target) == (0, f"{target}: no problems\n")
  code, _ = call(monkeypatch, capsys, "verify", tmp_path / "absent")
  assert "absent does not exist" in str(code) or "does not exist" in str(code)


def test_check_counts_conversations(tmp_path, monkeypatch, capsys):
  path = tmp_path / "c.jsonl"
  turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
  path.write_text(json.dumps({"messages": turns}) + "\n")
  code, printed = call(monkeypatch, capsys, "check", path)
  assert code == 0 and "1 conversation" in printed
  path.write_text(json.dumps({"messages": turns[1:]}) + "\n")
  code, _ = call(monkeypatch, capsys, "check", path)
  assert f"{path}:1" in str(code)


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
