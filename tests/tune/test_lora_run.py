"""Adapters in a run: trained, resumed, scored, loaded merged, exported."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from test_experiment import corpus, experiment, open_on_one_device  # noqa: F401

import lladax
from lladax.config import from_json, to_json
from lladax.experiment import Start, train
from lladax.train import heldout_bound, load_params
from lladax.tune import LoraConfig, merge

LORA = LoraConfig(rank=2)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):  # noqa: F811
  workdir = tmp_path_factory.mktemp("lora") / "base"
  with open_on_one_device(experiment(corpus), workdir) as run:
    train(run)
  return workdir


def adapted(corpus, base, steps=6):  # noqa: F811
  return experiment(
    corpus, name="adapted", steps=steps, seed=1, start=Start(path=str(base)), lora=LORA
  )


@pytest.mark.slow
def test_a_run_trains_adapters_on_weights_that_stay(corpus, base, tmp_path):  # noqa: F811
  config = adapted(corpus, base)
  assert from_json(to_json(config)) == config
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  with open_on_one_device(config, whole) as run:
    before = jax.device_get(run.base)
    score = heldout_bound(run.config.model, run.data, run.mesh, mc_num=4)
    # Fresh adapters change nothing.
    assert score(run.weights(run.state))["heldout/nll"] == pytest.approx(
      score(run.base)["heldout/nll"], rel=1e-6
    )
    state = train(run)
    after = score(run.weights(state))["heldout/nll"]
    adapters = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.base))
  assert after < score_of(base, corpus)

  # In two parts it is the same run.
  with open_on_one_device(dataclasses.replace(config, steps=3), parts) as run:
    train(run)
  with open_on_one_device(config, parts) as run:
    assert int(run.state.step) == 3
    again = jax.device_get(train(run).params)
  jax.tree.map(np.testing.assert_array_equal, adapters, again)

  # Only adapters are in its checkpoints; whoever loads it gets the sum.
  saved = load_params(whole).params
  assert jax.tree.structure(saved) == jax.tree.structure(adapters)
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
  assert count(saved) < count(before) / 4
  model = lladax.load(whole)
  expected = merge(config.model, LORA, before, adapters)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), model.params, expected
  )
  model.save(tmp_path / "exported")
  exported = lladax.load(tmp_path / "exported", progress=False)
  np.testing.assert_allclose(exported.logits([1, 2, 3]), model.logits([1, 2, 3]), atol=1e-6)


def score_of(workdir, corpus):  # noqa: F811
  with open_on_one_device(experiment(corpus), workdir) as run:
    return heldout_bound(run.config.model, run.data, run.mesh, mc_num=4)(run.state.params)[
      "heldout/nll"
    ]


def test_adapters_need_weights(corpus):  # noqa: F811
  with pytest.raises(ValueError, match="say which with start="):
    experiment(corpus, lora=LORA)


def test_weights_that_are_gone_are_named(corpus, tmp_path):  # noqa: F811
  base = tmp_path / "base"
  with open_on_one_device(experiment(corpus), base) as run:
    run.checkpoints.save(0, run.state)
  with open_on_one_device(adapted(corpus, base, steps=3), tmp_path / "run") as run:
    run.checkpoints.save(0, run.state)
  start = tmp_path / "run" / "start.json"
  start.write_text(start.read_text().replace(str(base), "/no/such/place"))
  with pytest.raises(lladax.train.CheckpointError, match="adapters only"):
    lladax.load(tmp_path / "run")
