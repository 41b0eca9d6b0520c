"""What a run writes for people: records in JSONL and TensorBoard, a progress bar, its own record.

Only process 0 writes. A record is written whole or not at all to `metrics.jsonl`; after a restart
those of steps that will be taken again are dropped, so every step is there once.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lladax.train import routing
from lladax.train.spool import Spool
from lladax.types import Sums

RECORDS = "metrics.jsonl"
PACKAGES = (
  "lladax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy",
)  # fmt: skip


class Metrics:
  """Adds up the `Sums` of steps, and writes their means every `every` steps.

  It is a reader for `lladax.train.loop.fit`, and its window is saved with a checkpoint (it has
  `get_state` and `set_state`), so that a restart in the middle of a window writes the same record.

  Args:
    workdir: gets `metrics.jsonl` and `tensorboard/`; a bucket gets them when a checkpoint is saved.
    steps: length of the run, for the time that is left.
    every: steps per record.
    tokens_per_step: of the global batch, for tokens/s.
    rates: what else a step is worth, by the name of the rate in a record; see
      `lladax.experiment.rates`.
    also: step -> other values of a record, such as epochs.
    show: progress on the terminal, or lines where standard output is none.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    steps: int,
    every: int = 10,
    tokens_per_step: int = 0,
    rates: Mapping[str, float] | None = None,
    also: Callable[[int], dict[str, Any]] | None = None,
    show: bool = True,
  ):
    if every < 1:
      raise ValueError(f"log_every is at least 1; got {every}")
    self._steps, self._every, self._tokens = steps, every, tokens_per_step
    self._rates = {"steps_per_second": 1, "tokens_per_second": tokens_per_step, **(rates or {})}
    self._also = also
    self._writes = jax.process_index() == 0
    self._spool = Spool(workdir)
    self._sums: dict[str, np.ndarray] = {}
    self._counts: dict[str, np.ndarray] = {}
    self._seconds, self._timed_steps = 0.0, 0
    self._records = self._tensorboard = None
    self._display = make_display(steps) if show and self._writes else None

  def __enter__(self) -> Metrics:
    return self

  def __exit__(self, *exception):
    self.close()

  def start(self, step: int):
    """Opens the files; records after `step`, the last one taken, are dropped.

    Called again, it goes on from another step.
    """
    if not self._writes:
      return
    self._close_files()
    from tensorboardX import SummaryWriter

    self._spool.fetch(RECORDS)
    workdir = self._spool.local
    workdir.mkdir(parents=True, exist_ok=True)
    drop_records_after(workdir / RECORDS, step)
    self._records = open(workdir / RECORDS, "a", encoding="utf-8")
    self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
    if self._display:
      self._display.start(step)

  def close(self):
    self._close_files()
    if self._display is not None:
      self._display.close()
    self._display = None

  def _close_files(self):
    for writer in (self._records, self._tensorboard):
      if writer is not None:
        writer.close()
    if self._records is not None:
      self._spool.push()
    self._records = self._tensorboard = None

  def __call__(self, step: int, metrics: Sums, seconds: float | None):
    """Takes in one step; `seconds` it took, or None where that says nothing (compilation)."""
    for mine, new in ((self._sums, metrics.sums), (self._counts, metrics.counts)):
      for name, value in new.items():
        # float64, so that a window does not depend on where it was cut by a restart.
        mine[name] = mine.get(name, 0.0) + np.asarray(value, np.float64)
    if seconds is not None:
      self._seconds, self._timed_steps = self._seconds + seconds, self._timed_steps + 1
    if step % self._every == 0 or step == self._steps:
      self._write_window(step)
    elif self._display:
      self._display.advance(step)

  def _write_window(self, step: int):
    values = self._means()
    if self._seconds > 0:
      speed = self._timed_steps / self._seconds
      values |= {name: speed * amount for name, amount in self._rates.items()}
    values["tokens"] = step * self._tokens
    if self._also is not None:
      values |= self._also(step)
    self.write(step, values)
    if self._display:
      self._display.update(step, values)
    self._sums, self._counts, self._seconds, self._timed_steps = {}, {}, 0.0, 0

  def _means(self) -> dict[str, Any]:
    """Sum over count; what was never counted is left out, or NaN within an array."""
    means = routing.summary(self._sums, self._counts)
    for name, total in self._sums.items():
      if name in routing.SUMS:
        continue
      count = np.broadcast_to(self._counts[name], np.shape(total))
      if np.any(count > 0):
        means[name] = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return means

  def write(self, step: int, values: dict[str, Any]):
    """One record: numbers and small arrays by name, such as those of an evaluation."""
    if self._records is None:
      return
    record = {"step": step, "time": round(time.time(), 3)}
    record |= {name: _as_json(value) for name, value in values.items()}
    self._records.write(json.dumps(record) + "\n")
    # To the system, which keeps it when this process is killed.
    self._records.flush()
    for name, value in _scalars(values):
      self._tensorboard.add_scalar(name, value, step)
    self._tensorboard.flush()

  def get_state(self) -> dict[str, dict[str, Any]]:
    """The window that is open; exact as JSON. What was written is in the workdir then, a bucket too."""
    if self._records is not None:
      self._spool.push()
    parts = {"sums": self._sums, "counts": self._counts}
    return {
      key: {name: np.asarray(v).tolist() for name, v in d.items()} for key, d in parts.items()
    }

  def set_state(self, state: dict[str, dict[str, Any]]):
    self._sums, self._counts = (
      {name: np.asarray(value, np.float64) for name, value in state[key].items()}
      for key in ("sums", "counts")
    )
    self._seconds, self._timed_steps = 0.0, 0


def read_records(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """All whole records of a run, in order."""
  path = epath.Path(workdir) / RECORDS
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  return [record for line in lines if (record := _parse(line)) is not None]


def evaluated(workdir: str | os.PathLike, steps: Collection[int], metric: str) -> dict[int, float]:
  """Recorded values of a metric by step, of those of these steps that have one."""
  return {
    record["step"]: record[metric]
    for record in read_records(workdir)
    if record["step"] in steps and isinstance(record.get(metric), int | float)
  }


def drop_records_after(path: pathlib.Path, step: int):
  """Leaves the whole records of steps up to `step`; the file is replaced in one move."""
  if not path.exists():
    return
  lines = path.read_text(encoding="utf-8").splitlines()
  records = [(line, _parse(line)) for line in lines]
  kept = [line for line, record in records if record is not None and record["step"] <= step]
  if kept == lines:
    return
  new = path.with_suffix(".new")
  new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
  os.replace(new, path)


def _parse(line: str) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
  except json.JSONDecodeError:
    return None
  return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _as_json(value):
  if isinstance(value, str | bool | int):
    return value
  value = np.asarray(value, np.float64)
  if value.ndim:
    return [_as_json(item) for item in value]
  # JSON has no NaN.
  return float(value) if math.isfinite(value) else None


def _scalars(values: dict[str, Any]):
  """(name, number): of an array up to 16 entries each, of a larger one its extremes and mean.

  Entries of an array that were not counted (NaN) are left out: TensorBoard would warn of each.
  """
  for name, value in values.items():
    if isinstance(value, str):
      continue
    array = np.asarray(value, np.float64)
    if array.ndim == 0:
      yield name, float(array)
    elif array.size <= 16:
      entries = enumerate(array.flat)
      yield from ((f"{name}/{i}", float(entry)) for i, entry in entries if not np.isnan(entry))
    else:
      for word, reduce in (("min", np.nanmin), ("mean", np.nanmean), ("max", np.nanmax)):
        yield f"{name}/{word}", float(reduce(array))


# --- Progress ---


def make_display(steps: int):
  """A bar on a terminal, else lines."""
  console = Console()
  return Bar(steps, console) if console.is_terminal else Lines(steps)


class Bar:
  """Step, loss, tokens/s and the time left, on one line that stays at the bottom."""

  def __init__(self, steps: int, console: Console):
    self._steps = steps
    self._progress = Progress(
      TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
      BarColumn(),
      TextColumn("{task.fields[status]}"),
      TimeElapsedColumn(),
      TextColumn("left"),
      TimeRemainingColumn(),
      console=console,
    )

  def start(self, step: int):
    if self._progress.tasks:
      self._progress.update(self._task, completed=step, status="set back")
      return
    self._progress.start()
    self._task = self._progress.add_task("", total=self._steps, completed=step, status="compiling")

  def advance(self, step: int):
    self._progress.update(self._task, completed=step)

  def update(self, step: int, values: dict[str, Any]):
    self._progress.update(self._task, completed=step, status=status(values))

  def close(self):
    self._progress.stop()


class Lines:
  """A line per record."""

  def __init__(self, steps: int):
    self._steps = steps

  def start(self, step: int):
    text = f"resuming after step {step}" if step else "starting"
    print(f"{text}, {self._steps} steps in all", flush=True)

  def advance(self, step: int):
    pass

  def update(self, step: int, values: dict[str, Any]):
    rate = values.get("steps_per_second")
    left = f"  {time_left((self._steps - step) / rate)} left" if rate else ""
    print(f"step {step}/{self._steps}  {status(values)}{left}", flush=True)

  def close(self):
    pass


def status(values: dict[str, Any]) -> str:
  parts = [f"loss {float(values['loss']):.4f}"] if "loss" in values else ["loss not finite"]
  if values.get("tokens_per_second"):
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
  if values.get("mfu"):
    parts.append(f"MFU {values['mfu']:.1%}")
  return "  ".join(parts)


def time_left(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"


# --- The record of a run ---


def write_run_record(workdir: str | os.PathLike):
  """Appends to `runs.jsonl` what this start runs on: command, revision, versions, devices."""
  if jax.process_index() != 0:
    return
  record = {
    "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    "command": sys.orig_argv,
    "git_revision": git_revision(),
    "versions": {name: version for name in PACKAGES if (version := _version(name))},
    "python": platform.python_version(),
    "platform": jax.default_backend(),
    "device_kind": jax.devices()[0].device_kind,
    "num_devices": jax.device_count(),
    "num_processes": jax.process_count(),
  }
  path = epath.Path(workdir) / "runs.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  # Whole and not appended to: a bucket does not append.
  before = path.read_text() if path.exists() else ""
  path.write_text(f"{before}{json.dumps(record)}\n")


def git_revision() -> str | None:
  """The commit of the sources, `-dirty` appended where they were changed; None outside git."""
  command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
  try:
    result = subprocess.run(
      [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return result.stdout.strip() or None


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
