"""A picture of runs that followed each other."""

import json

import pytest

from experiments import plot_runs


def write(workdir, steps, **more):
  workdir.mkdir()
  records = [
    {"step": s, "time": 0.0, "tokens": 10 * s, "masked_nll": 5.0 / s, "learning_rate": 1e-3, **more}
    for s in range(1, steps + 1)
  ]
  records.append({"step": steps, "time": 0.0, "heldout/nll": 3.0})
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_runs_in_a_row_count_their_tokens_on(tmp_path):
  write(tmp_path / "one", 3, load_max_over_mean_by_t=[[1.5, None, 2.0]])
  write(tmp_path / "two", 2)
  records = plot_runs.curves([tmp_path / "one", tmp_path / "two"])
  assert [r["tokens"] for r in records if "masked_nll" in r] == [10, 20, 30, 40, 50]
  target = tmp_path / "pictures" / "curves.png"
  assert plot_runs.main([str(tmp_path / "one"), str(tmp_path / "two"), f"--target={target}"]) == 0
  assert target.read_bytes().startswith(b"\x89PNG")


def test_a_directory_that_is_no_run_is_one_line(tmp_path, capsys):
  assert plot_runs.main([str(tmp_path)]) == 2
  assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no records")


def test_smoothing_is_a_running_median():
  assert plot_runs.smooth([1.0, 9.0, 2.0], 3).tolist() == pytest.approx([5.0, 2.0, 5.5])
