"""Fine-tuning as a run: the toy twin of the experiment, from nothing and from a pre-trained run."""

import dataclasses
import functools
import json
import unittest.mock

import jax
import pytest

import lladax
from experiments import sft_llada_moe
from lladax.config import ConfigError
from lladax.data import DataConfig, train_bpe
from lladax.experiment import Experiment, Start, open_run
from lladax.sharding import make_mesh
from lladax.train import read_records


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """One of the eight devices: a third of the time to compile."""
  one = functools.partial(make_mesh, devices=jax.devices()[:1])
  with unittest.mock.patch("lladax.experiment.run.make_mesh", one):
    yield


@pytest.fixture(scope="module")
def before(tmp_path_factory):
  """The workdir of a run that has just begun, of the architecture of the toy twin."""
  folder = tmp_path_factory.mktemp("runs")
  (folder / "text.txt").write_text("some text to begin with. " * 40)
  config = Experiment(
    name="before",
    model=sft_llada_moe.config("sft", debug=True).model,
    data=DataConfig(corpus=str(folder / "text.txt"), heldout=0.0, length=32, batch_size=8),
    steps=2,
  )
  with open_run(config, folder / "before") as run:
    run.checkpoints.save(0, run.state)
  return folder / "before"


@pytest.mark.parametrize("stage", sft_llada_moe.STAGES)
def test_the_experiment_is_a_config(stage):
  config = sft_llada_moe.config(stage)
  assert config.data.length <= config.model.max_position_embeddings
  assert config.steps > 10_000
  assert config.name == f"llada_moe/{stage}"


def test_a_pretrained_run_learns_to_chat(before, tmp_path):
  config = sft_llada_moe.config("sft", debug=True)
  config = dataclasses.replace(
    config,
    start=Start(path=str(before), data="restart"),
    data=dataclasses.replace(config.data, tokenizer=None),
    steps=4,
    eval_every=4,
  )
  sft_llada_moe.train(config, tmp_path / "sft")
  records = read_records(tmp_path / "sft")
  assert any("heldout/nll" in record for record in records)
  model = lladax.load(tmp_path / "sft")
  # What the template needs was appended to the bytes of the run before.
  assert model.tokenizer.vocab_size == 258 + 3
  assert model.stop_ids == (model.tokenizer.engine.token_to_id("<|role_end|>"),)
  assert isinstance(model.chat("1+1?"), str)
  sft_llada_moe.train(config, tmp_path / "sft")  # there is nothing left to do


def test_a_start_with_other_ids_is_refused(before, tmp_path):
  train_bpe(["other words of another text " * 20], 280).save(tmp_path / "other")
  config = sft_llada_moe.config("sft", debug=True)
  config = dataclasses.replace(
    config,
    start=Start(path=str(before)),
    data=dataclasses.replace(config.data, tokenizer=str(tmp_path / "other")),
  )
  with pytest.raises(ConfigError, match="its ids would mean other text"):
    with open_run(config, tmp_path / "sft"):
      pass
  assert not (tmp_path / "sft").exists()


def test_bad_conversations_end_a_run_before_it_begins(tmp_path):
  path = tmp_path / "c.jsonl"
  path.write_text(json.dumps({"messages": [{"role": "human", "content": "x"}]}))
  config = sft_llada_moe.config("sft", debug=True)
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, conversations=str(path))
  )
  with pytest.raises(ConfigError, match=r"c.jsonl:1: messages\[0\].role: expected one of"):
    with open_run(config, tmp_path / "sft"):
      pass
  assert not (tmp_path / "sft").exists()


@pytest.mark.slow
def test_packed_rows_train(tmp_path):
  sft_llada_moe.train(sft_llada_moe.config("sft_packed", debug=True), tmp_path / "sft")
