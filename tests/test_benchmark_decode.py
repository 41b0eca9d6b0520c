"""The decoding benchmark runs, and its floor counts what a pass has to read and multiply."""

import functools
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments.benchmark_decode import agreement, percentile
from experiments.benchmark_decode_floor import _passes, floor
from lladax.infer import DualCache, NoCache, PrefixCache, SamplerConfig, Vicinity, generate
from lladax.models import Denoiser, count_parameters, for_inference, init_params, tiny
from lladax.moe import MoEConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = tiny(
  vocab_size=64,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=2,
  moe=MoEConfig(num_experts=4, num_experts_per_tok=4, expert_intermediate_size=8),
)
PROMPT = [5, 6, 7]


@functools.cache
def answer(cache):
  config, params = for_inference(CONFIG, init_params(CONFIG, jax.random.key(0)))
  sampler = SamplerConfig(gen_length=8, steps=4, block_length=4, cache=cache)
  result = generate(Denoiser(config), params, [PROMPT], sampler, mask_id=1, eos_id=0, pad_id=0)
  return config, params, sampler, result


def test_passes_are_those_of_the_cache():
  # Two blocks in two iterations each after three given tokens.
  revealed_at = np.array([[-1, -1, -1, 0, 1, 1, 0, 2, 2, 3, 3]])
  result = types.SimpleNamespace(
    revealed_at=revealed_at, is_text=revealed_at > -2, row=lambda index: list(range(11))
  )
  lengths = {"gen_length": 8, "steps": 4, "block_length": 4}
  for cache, passes in (
    (NoCache(), [(0, 0, 11), (1, 0, 11), (2, 0, 11), (3, 0, 11)]),
    (DualCache(), [(0, 0, 11), (1, 3, 4), (2, 0, 11), (3, 7, 4)]),
    (PrefixCache(), [(0, 0, 11), (1, 3, 8), (2, 0, 11), (3, 7, 4)]),
    (Vicinity(before=2, after=1, warmup=0), [(0, 0, 11), (1, 1, 7), (2, 0, 11), (3, 4, 7)]),
  ):
    sampler = SamplerConfig(**lengths, cache=cache)
    assert list(_passes(sampler, result, 3)) == passes, cache


def test_the_floor_of_a_whole_pass():
  config, params, sampler, result = answer(NoCache())
  found = floor(config, params, sampler, result, len(PROMPT))
  length, width = len(PROMPT) + 8, CONFIG.hidden_size
  assert found["experts"] == 4  # every token goes to all of them
  table = CONFIG.vocab_size * width
  kept = 2 * length * width * CONFIG.num_hidden_layers
  weights = count_parameters(CONFIG).total - table + length * width
  assert found["bytes"] == 4 * (weights + kept)
  # Each active weight is used once per token, but for norms and, outside the block, the head.
  norms = 2 * (2 * width + 2 * CONFIG.head_size) + width
  matrices = count_parameters(CONFIG).active_non_embedding - norms
  attention = 4 * length * width * CONFIG.num_hidden_layers
  head = 2 * table * sampler.block_length
  assert found["flops"] == (2 * matrices + attention) * length + head


def test_what_is_said_of_answers():
  assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and percentile([3.0, 1.0, 2.0], 0.95) == 3.0
  assert agreement([[1, 2], [3, 4]], [[1, 0], [3, 4]]) == 0.75


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.benchmark_decode", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.mark.slow
def test_one_run_prints_a_table_and_writes_json(chatty, tmp_path):
  path = tmp_path / "decode.json"
  flags = (
    f"--model={chatty} --prompt_length=4 --gen_length=16 --block_length=8 --steps=4 --rounds=2"
  )
  sides = ["", "weights=int8 cache=DualCache()"]
  ran = command(*flags.split(), "--torch=", *(f"--ours={side}" for side in sides), f"--json={path}")
  assert ran.returncode == 0, ran.stderr
  report = json.loads(path.read_text())
  assert report["device"] == "cpu" and report["versions"]["jax"]
  assert all(speed > 0 for speed in report["ceilings"].values())
  assert report["setting"]["gen_length"] == 16 and report["setting"]["rounds"] == 2
  rows = {row["side"]: row for row in report["rows"]}
  assert list(rows) == sides
  for row in rows.values():
    assert row["nfe"] == 4 and 0 < row["tpf"] <= 4
    assert row["p50_s"] <= row["p95_s"] and row["ms_per_forward"] > 0
    assert 1 <= row["active_experts"] <= 4
    assert row["over_floor"] == pytest.approx(row["ms_per_forward"] / row["floor_ms"])
    assert any(line.startswith("lladax " + row["side"]) for line in ran.stdout.splitlines())
  assert rows[""]["agrees"] == 1.0


def test_help_names_the_flags():
  shown = command("--helpshort").stdout
  assert all(flag in shown for flag in ("--ours", "--torch", "--json", "--rounds", "--model"))


@pytest.mark.slow
def test_a_window_reads_fewer_experts_or_as_many():
  found = {}
  for cache in (NoCache(), DualCache()):
    config, params, sampler, result = answer(cache)
    found[type(cache)] = floor(config, params, sampler, result, len(PROMPT))
  assert found[DualCache]["experts"] <= found[NoCache]["experts"]
  assert found[DualCache]["flops"] < found[NoCache]["flops"]
  assert np.isfinite(list(found[DualCache].values())).all()
