"""LLaDA-MoE-7B-A1B from nothing: the four stages of its pre-training (arXiv 2509.24389, section 3).

| stage | tokens | text | rows, rotary base |
|---|---|---|---|
| pretrain_1 | 10T | a large mixture, from scratch | 4,096, 10,000 |
| pretrain_2 | 10T | the same corpus sampled anew, more mathematics and code | 4,096, 10,000 |
| anneal_1 | 500B | of high quality; begins with the best checkpoint of pretrain_2 | 4,096, 10,000 |
| anneal_2 | 500B | goes on; longer context | 8,192, 50,000 |

From the paper besides: the model; 1% of the rows cropped to a length of U{8..4096}; one time
t ~ U(0, 1) per row, weight 1 / t; balance loss 0.01 and router z-loss 0.001. It does not publish
batch size, learning rates, optimizer, precision or the shares of the mixture: ours are marked below,
with the published relative that they are taken from. Never run whole by us (it is 20T tokens); its
toy twin, `:debug`, is, in the tests, and `lladax.plan` compiles it for a pod.

  python -m lladax.data prepare --source='web/*.jsonl' --target=data/4096/web --length=4096 ...
  python -m experiments.pretrain_llada_moe --config=pretrain_1
  python -m experiments.pretrain_llada_moe --config=all:debug --workdir=runs/debug
  python -m lladax.plan --experiment=pretrain_llada_moe:anneal_2 --topology=v5p:4x4x4
"""

from __future__ import annotations

import dataclasses
import pathlib

from lladax.data import DataConfig, PreparedConfig, Source
from lladax.diffusion import Objective
from lladax.experiment import Best, Experiment, Start, heldout_hook, main, open_run
from lladax.experiment import train as train_run
from lladax.infer import SamplerConfig
from lladax.models import llada_moe_7b_a1b, tiny
from lladax.sharding import MeshConfig
from lladax.train import Constant, CosineDecay, OptimizerConfig

STAGES = ("pretrain_1", "pretrain_2", "anneal_1", "anneal_2")
TOKENS = {"pretrain_1": 10e12, "pretrain_2": 10e12, "anneal_1": 500e9, "anneal_2": 500e9}
TOKENS_PER_STEP = 1024 * 4096  # ours: as OLMoE (arXiv 2409.02060), its autoregressive twin
# Ours: AdamW as LLaDA-8B (arXiv 2502.09992), which warms up over 2,000 updates to 4e-4. How the rate
# falls from stage to stage is LLaDA-MoE v2's (arXiv 2608.03457): 1.5e-4, 1e-4, 5e-5, 1e-5, 5e-6.
PEAK = 4e-4
# Ours; the paper says what each stage has more of. English, code and Chinese in the first stage are
# as in LLaDA-8B, mathematics taken from its English.
SHARES = {
  "pretrain_1": {"web": 0.56, "code": 0.28, "chinese": 0.11, "math": 0.05},
  "pretrain_2": {"web": 0.41, "code": 0.36, "chinese": 0.11, "math": 0.12},
  "anneal_1": {"web_best": 0.40, "code_best": 0.36, "chinese_best": 0.10, "math_best": 0.14},
}
SHARES["anneal_2"] = SHARES["anneal_1"]


def config(stage: str = STAGES[0], debug: bool = False) -> Experiment:
  """One stage; `debug` is the same with a tiny model, a small text and a dozen steps."""
  stages = {}
  for make in (pretrain_1, pretrain_2, anneal_1, anneal_2):
    before = list(stages.values())[-1] if stages else None
    stages[make.__name__] = make(before)
  return toy(stages[stage], stage) if debug else stages[stage]


def pretrain_1(_) -> Experiment:
  return Experiment(
    name="llada_moe/pretrain_1",
    # Ours: bfloat16 compute with float32 parameters and optimizer state, every layer recomputed.
    model=llada_moe_7b_a1b(
      rope_theta=10_000.0, max_position_embeddings=4096, dtype="bfloat16", param_dtype="float32",
      remat="full",
    ),
    data=mixture("pretrain_1", length=4096),
    objective=Objective(balance_loss=0.01, z_loss=0.001),
    optimizer=OptimizerConfig(
      peak=PEAK, schedule=Constant(warmup=2000), weight_decay=0.1, clip=1.0
    ),
    sampler=SamplerConfig(gen_length=1024, steps=1024, block_length=64),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=steps("pretrain_1"),
    seed=1,
    log_every=10,
    eval_every=5000,
    save_every=1000,
    keep_every=100_000,
    keep_best=Best("heldout/nll"),
  )  # fmt: skip


def pretrain_2(before: Experiment) -> Experiment:
  return dataclasses.replace(
    before,
    name="llada_moe/pretrain_2",
    start=Start(stage="pretrain_1", optimizer="keep"),
    data=mixture("pretrain_2", length=4096),
    optimizer=dataclasses.replace(before.optimizer, peak=PEAK / 1.5, schedule=Constant()),
    steps=steps("pretrain_2"),
    seed=2,
  )


def anneal_1(before: Experiment) -> Experiment:
  return dataclasses.replace(
    before,
    name="llada_moe/anneal_1",
    start=Start(stage="pretrain_2", checkpoint=Best("heldout/nll"), optimizer="keep"),
    data=mixture("anneal_1", length=4096),
    optimizer=dataclasses.replace(
      before.optimizer, peak=PEAK / 3, schedule=CosineDecay(final=3 / 15)
    ),
    steps=steps("anneal_1"),
    seed=3,
  )


def anneal_2(before: Experiment) -> Experiment:
  model = dataclasses.replace(before.model, rope_theta=50_000.0, max_position_embeddings=8192)
  return dataclasses.replace(
    before,
    name="llada_moe/anneal_2",
    start=Start(stage="anneal_1", optimizer="keep"),
    model=model,
    data=mixture("anneal_2", length=8192),
    optimizer=dataclasses.replace(
      before.optimizer, peak=PEAK / 15, schedule=CosineDecay(final=1 / 2)
    ),
    steps=steps("anneal_2"),
    seed=4,
  )


def steps(stage: str) -> int:
  return round(TOKENS[stage] / TOKENS_PER_STEP)


def mixture(stage: str, length: int) -> PreparedConfig:
  """Rows that `python -m lladax.data prepare` wrote, with the tokenizer of the release."""
  return PreparedConfig(
    sources=tuple(
      Source(path=f"data/{length}/{name}", weight=weight) for name, weight in SHARES[stage].items()
    ),
    length=length,
    batch_size=TOKENS_PER_STEP // length,
    random_length=0.01,
    shortest=8,
  )


def toy(whole: Experiment, stage: str) -> Experiment:
  """The stage at a size for a CPU: what is special about it stays, and what is large shrinks."""
  length = whole.data.length // 64
  return dataclasses.replace(
    whole,
    name=f"llada_moe_debug/{stage}",
    model=tiny(
      num_hidden_layers=1, hidden_size=64, rope_theta=whole.model.rope_theta,
      max_position_embeddings=length,
    ),
    data=DataConfig(
      corpus="shakespeare", length=length, batch_size=512 // length, heldout=0.02,
      random_length=whole.data.random_length,
    ),
    optimizer=dataclasses.replace(
      whole.optimizer,
      peak=10 * whole.optimizer.peak,
      schedule=Constant(warmup=4) if stage == STAGES[0] else whole.optimizer.schedule,
    ),
    sampler=SamplerConfig(gen_length=length // 2, steps=8, block_length=length // 2),
    mesh=MeshConfig(),
    steps=12,
    log_every=2,
    eval_every=4,
    save_every=4,
    keep_every=None,
  )  # fmt: skip


def train(cfg: Experiment, workdir: pathlib.Path):
  with open_run(cfg, workdir) as run:
    train_run(run, [heldout_hook(run)])


if __name__ == "__main__":
  main(config, train, stages=STAGES)
