"""Records of a run whose workdir is a bucket: an object store stands in that only takes whole files."""

import pathlib

import jax.numpy as jnp
import pytest

from lladax.train import spool
from lladax.train.metrics import Metrics, read_records, write_run_record
from lladax.types import Sums


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder that is taken for a bucket; whoever opens a file in it to append is caught."""
  folder = tmp_path / "bucket" / "run"
  monkeypatch.setenv("LLADAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(spool, "is_remote", lambda path: str(path).startswith(str(folder)))
  return folder


def take(metrics, steps):
  for step in steps:
    metrics(step, Sums({"loss": jnp.float32(step)}, {"loss": jnp.float32(1)}), None)


def test_a_bucket_has_the_records_when_a_checkpoint_is_saved(bucket):
  with Metrics(bucket, steps=9, every=1, show=False) as metrics:
    metrics.start(0)
    take(metrics, [1, 2])
    assert read_records(bucket) == []
    metrics.get_state()
    assert [record["step"] for record in read_records(bucket)] == [1, 2]
    take(metrics, [3])
  assert [record["step"] for record in read_records(bucket)] == [1, 2, 3]
  assert list((bucket / "tensorboard").iterdir())


def test_another_machine_goes_on_with_them(bucket, tmp_path, monkeypatch):
  for machine, steps in (("one", [1, 2, 3]), ("two", [3, 4]), ("one", [5])):
    monkeypatch.setenv("LLADAX_CACHE", str(tmp_path / machine))
    with Metrics(bucket, steps=9, every=1, show=False) as metrics:
      metrics.start(steps[0] - 1)
      take(metrics, steps)
  assert [record["step"] for record in read_records(bucket)] == [1, 2, 3, 4, 5]


def test_runs_are_recorded_one_after_the_other(tmp_path):
  for _ in range(2):
    write_run_record(tmp_path / "run")
  assert (tmp_path / "run" / "runs.jsonl").read_text().count("\n") == 2


def test_what_is_remote():
  assert spool.is_remote("gs://bucket/run") and not spool.is_remote(pathlib.Path("/gs/run"))
