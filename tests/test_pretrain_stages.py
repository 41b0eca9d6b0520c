"""The published recipe as declared, and its toy twin from the first stage to the last."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import lladax
from experiments import pretrain_llada_moe as recipe
from lladax.config import from_json, override, to_json
from lladax.experiment import chosen, run_command
from lladax.sharding import make_mesh
from lladax.train import read_records


def test_the_stages_are_the_papers():
  """arXiv 2509.24389, section 3."""
  stages = [recipe.config(stage) for stage in recipe.STAGES]
  tokens = [s.steps * s.data.batch_size * s.data.length for s in stages]
  np.testing.assert_allclose(tokens, [10e12, 10e12, 500e9, 500e9], rtol=1e-5)
  assert [s.data.length for s in stages] == [4096, 4096, 4096, 8192]
  assert [s.model.max_position_embeddings for s in stages] == [4096, 4096, 4096, 8192]
  assert [s.model.rope_theta for s in stages] == [1e4, 1e4, 1e4, 5e4]
  assert [s.start and s.start.stage for s in stages] == [None, *recipe.STAGES[:3]]
  assert all((s.objective.balance_loss, s.objective.z_loss) == (0.01, 0.001) for s in stages)
  assert all((s.data.random_length, s.data.shortest) == (0.01, 8) for s in stages)
  more = [dict((s.path, s.weight) for s in stage.data.sources) for stage in stages[:2]]
  assert all(
    more[1][f"data/4096/{name}"] > more[0][f"data/4096/{name}"] for name in ("code", "math")
  )
  assert all(sum(shares.values()) == pytest.approx(1) for shares in recipe.SHARES.values())
  # Everything else is as in the first stage, and each has noise of its own.
  assert len({s.seed for s in stages}) == 4
  changed = ("name", "start", "data", "optimizer", "steps", "seed", "model")
  same = {name: getattr(stages[0], name) for name in changed}
  assert all(dataclasses.replace(stage, **same) == stages[0] for stage in stages)


def test_every_stage_survives_text_and_the_command_line():
  for config in chosen(recipe.config, recipe.STAGES, "all"):
    assert from_json(to_json(config)) == config
  changed = override(
    recipe.config("anneal_1"), ["start.checkpoint=AtStep(5)", "start.data=restart"]
  )
  assert (changed.start.checkpoint.step, changed.start.data) == (5, "restart")


@pytest.mark.slow
def test_the_toy_goes_through_all_stages(tmp_path, monkeypatch):
  one = functools.partial(make_mesh, devices=jax.devices()[:1])  # compiles in a third of the time
  monkeypatch.setattr("lladax.experiment.run.make_mesh", one)
  configs = chosen(recipe.config, recipe.STAGES, "all:debug")
  status = run_command(
    lambda: configs, {"train": recipe.train}, workdir=str(tmp_path), assignments=[], mode="train"
  )
  assert status == 0
  losses = []
  for config, stage in zip(configs, recipe.STAGES, strict=True):
    records = read_records(tmp_path / stage)
    losses += [record["masked_nll"] for record in records if "masked_nll" in record]
    assert [r["step"] for r in records if "heldout/nll" in r] == [4, 8, 12]
    model = lladax.load(tmp_path / stage)
    assert model.config.max_position_embeddings == config.data.length
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(model.params)))
  assert losses[-1] < losses[0] - 0.5
