"""Timing tilings: the fastest is kept and found again, what does not run is passed over."""

import jax.numpy as jnp
import pytest

from kernels_pallas import op, tune
from kernels_pallas.grouped_matmul import api, grouped_matmul, pallas_tpu

SMALL = dict(rows=40, experts=3, model=16, ffn=8, dtype="float32")


@pytest.fixture
def tpu(tmp_path, monkeypatch):
  monkeypatch.setenv("LLADAX_CACHE", str(tmp_path))
  op.table.cache_clear()
  with op.target("TPU v5"), op.interpret():
    yield
  op.table.cache_clear()


def test_the_fastest_is_kept_and_found_again(tpu, monkeypatch):
  fast = op.Tiling(rows=16, columns=8, step=8)
  taken = {None: 3.0, fast: 1.0, op.Tiling(rows=32, columns=8): 2.0}
  monkeypatch.setattr(tune.Work, "candidates", lambda self: tuple(taken))
  monkeypatch.setattr(tune.Work, "function", lambda self, tiling: tiling)
  monkeypatch.setattr(tune, "seconds", lambda tiling, *_, **__: taken[tiling])
  lines = []
  found = tune.tune(tune.layer("pallas_tpu", **SMALL), 1, lines.append)
  assert set(found.values()) == {fast} and len(found) == 6
  assert any("1000.000 ms" in line for line in lines)

  # The op asks for what was kept.
  seen = []
  monkeypatch.setattr(
    pallas_tpu, "forward", lambda *args, tiling, **kwargs: seen.append(tiling) or args[0]
  )
  rows, weights = jnp.ones((33, 8)), jnp.ones((3, 8, 16))  # 33 and 40 rows: both up to 64
  grouped_matmul(rows, weights, jnp.full(3, 5, jnp.int32), implementation="pallas_tpu")
  assert seen == [fast]


def test_every_pass_runs_with_every_tiling_and_those_that_fail_are_counted(tpu):
  some = (op.Tiling(rows=16, columns=8, depth=8, step=8),)
  for work in {work.step: work for work in tune.layer("pallas_tpu", **SMALL)}.values():
    wrong = [] if work.step != "swiglu" else [op.Tiling(rows=16, columns=5)]
    best, taken, failed = tune.best_tiling(work, (*some, *wrong), 1, lambda line: None)
    assert best in some and taken > 0 and failed == len(wrong)
  with pytest.raises(RuntimeError, match="columns must divide F=8"):
    work = next(tune.layer("pallas_tpu", **SMALL))
    tune.best_tiling(work, [op.Tiling(rows=16, columns=5)], 1, print)


@pytest.mark.parametrize("implementation", api.PLATFORMS)
def test_there_is_something_to_time(implementation):
  with op.target("TPU v5" if implementation == "pallas_tpu" else "NVIDIA H100 80GB HBM3"):
    works = list(tune.layer(implementation, 65536, 64, 2048, 1024, "bfloat16"))
    assert len({work.key for work in works}) == len(works) == 6
    for work in works:
      candidates = work.candidates()
      assert candidates[0] is None and 10 < len(set(candidates)) == len(candidates) < 200


def test_a_cpu_has_nothing_to_tune(capsys):
  with pytest.raises(SystemExit):
    tune.main([])
  assert "nothing to time: 'cpu'" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    tune.main(["--help"])
  assert "kernels_pallas.tune" in capsys.readouterr().out
