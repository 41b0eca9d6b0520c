"""Laws of records: means over windows, each step once, whole lines."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.train import metrics as metrics_lib
from lladax.train.metrics import Metrics, read_records, write_run_record
from lladax.types import Sums


def sums(step):
  vector = np.array([step, 2.0 * step, 0.0], np.float32)
  return Sums(
    {"loss": np.float32(step) / 3, "by_t": vector},
    {"loss": np.float32(1 + step % 2), "by_t": np.array([1, 2, 0], np.float32)},
  )


def record_steps(metrics, first, last):
  for step in range(first, last + 1):
    metrics(step, sums(step), 0.5)


def untimed(workdir):
  return [{k: v for k, v in record.items() if k != "time"} for record in read_records(workdir)]


def test_a_record_has_the_means_of_its_window(tmp_path):
  with Metrics(tmp_path, steps=10, every=4, tokens_per_step=100, show=False) as metrics:
    metrics.start(0)
    record_steps(metrics, 1, 10)
  first, second, last = untimed(tmp_path)
  assert (first["step"], second["step"], last["step"]) == (4, 8, 10)
  assert first["loss"] == pytest.approx((1 + 2 + 3 + 4) / 3 / (2 + 1 + 2 + 1))
  # An entry that was never counted is no number.
  assert last["by_t"] == [pytest.approx((9 + 10) / 2), pytest.approx((18 + 20) / 4), None]
  assert (last["tokens"], last["tokens_per_second"]) == (1000, 200.0)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(0, 12), max_size=3), st.integers(1, 5))
def test_restarts_leave_the_records_of_an_uninterrupted_run(tmp_path_factory, restarts, window):
  """Saved at one step, killed some steps later, as often as it likes."""
  options = {"steps": 20, "every": window, "tokens_per_step": 10, "show": False}
  whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
  with Metrics(whole, **options) as metrics:
    metrics.start(0)
    for step in range(1, 21):
      metrics(step, sums(step), None)

  saved, state = 0, None
  for advance in [*restarts, 20]:
    with Metrics(cut, **options) as metrics:
      if state is not None:
        metrics.set_state(json.loads(json.dumps(state)))
      metrics.start(saved)
      target = min(saved + advance, 20)
      for step in range(saved + 1, target + 1):
        metrics(step, sums(step), None)
      saved, state = target, metrics.get_state()
      # These steps are lost in the kill and taken again.
      for step in range(saved + 1, min(saved + 4, 20) + 1):
        metrics(step, sums(step), None)
    with open(cut / "metrics.jsonl", "a") as file:
      file.write('{"step": 3, "lo')
  assert untimed(whole) == untimed(cut)


def test_broken_lines_and_later_steps_are_dropped_and_the_rest_is_left(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = ['{"step": 1, "loss": 2.0}', '{"step": 2}', '{"step": 3}', '{"st']
  path.write_text("\n".join(lines))
  metrics_lib.drop_records_after(path, 2)
  assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2}\n'
  metrics_lib.drop_records_after(tmp_path / "none.jsonl", 2)


def test_records_are_json_even_when_numbers_are_not_finite(tmp_path):
  with Metrics(tmp_path, steps=1, show=False) as metrics:
    metrics.start(0)
    metrics.write(1, {"a": float("nan"), "b": np.array([[1.0, np.inf]]), "note": "text", "n": 3})
  text = (tmp_path / "metrics.jsonl").read_text()
  record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
  assert (record["a"], record["b"], record["note"], record["n"]) == (None, [[1.0, None]], "text", 3)


def test_a_window_with_no_finite_step_has_no_loss(tmp_path, capsys):
  nothing = Sums({"loss": np.float32(0)}, {"loss": np.float32(0)})
  with Metrics(tmp_path, steps=2, every=2) as metrics:
    metrics.start(0)
    metrics(1, nothing, None)
    metrics(2, nothing, None)
  assert "loss" not in read_records(tmp_path)[0]
  assert "loss not finite" in capsys.readouterr().out


def test_lines_show_step_loss_speed_and_time_left(tmp_path, capsys):
  with Metrics(tmp_path, steps=8000, every=2, tokens_per_step=1000) as metrics:
    metrics.start(0)
    record_steps(metrics, 1, 2)
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    "starting, 8000 steps in all",
    "step 2/8000  loss 0.3333  2,000 tokens/s  1:06:39 left",
  ]


def test_tensorboard_gets_every_scalar(tmp_path):
  with Metrics(tmp_path, steps=2, every=2, show=False) as metrics:
    metrics.start(0)
    record_steps(metrics, 1, 2)
    metrics.write(2, {"heldout/bits": 1.25, "load": np.arange(32.0).reshape(2, 16)})
  (events,) = (tmp_path / "tensorboard").iterdir()
  content = events.read_bytes()
  for tag in (b"loss", b"by_t/0", b"heldout/bits", b"load/max", b"load/mean"):
    assert tag in content


def test_every_start_leaves_its_record(tmp_path):
  write_run_record(tmp_path)
  write_run_record(tmp_path)
  records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
  assert len(records) == 2
  record = records[0]
  assert record["versions"]["jax"] and record["device_kind"] == "cpu" and record["num_devices"] == 8
  head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
  if head.returncode == 0:
    assert record["git_revision"].startswith(head.stdout.strip())


def test_a_bad_window_is_refused(tmp_path):
  with pytest.raises(ValueError, match="got 0"):
    Metrics(tmp_path, steps=1, every=0)
