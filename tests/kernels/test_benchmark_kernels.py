"""The kernel benchmark runs, at tiny size, and its implementations agree."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.benchmark_kernels", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.mark.quick
@pytest.mark.slow
def test_one_run_prints_a_table_and_writes_json(tmp_path):
  path = tmp_path / "kernels.json"
  flags = "--size=tiny --rounds=2 --batch_seconds=0 --notorch".split()
  ran = command(*flags, f"--json={path}")
  assert ran.returncode == 0, ran.stderr
  report = json.loads(path.read_text())
  assert report["platform"] == "cpu" and report["versions"]["jax"]
  assert all(speed > 0 for speed in report["ceilings"].values())
  rows = report["rows"]
  assert not [row for row in rows if "error" in row]
  names = {row["op"] for row in rows}
  assert {"grouped_matmul fwd", "grouped_matmul dlhs", "grouped_matmul drhs"} <= names
  assert {"swiglu", "dispatch", "combine", "attention fwd and bwd"} <= names
  for row in rows:
    assert row["ms"] > 0 and row["of_ceiling"] > 0
    quantized = re.search("int8|float8", row["implementation"])
    assert row.get("difference", 0) < (0.1 if quantized else 1e-5), row
    shown = [line for line in ran.stdout.splitlines() if line.startswith(row["op"])]
    assert any(row["implementation"] in line for line in shown)
  assert "tokamax" in ran.stdout  # whose published numbers are printed beside


def test_help_names_the_flags():
  shown = command("--helpshort").stdout
  assert all(flag in shown for flag in ("--size", "--skew", "--json", "--rounds"))
