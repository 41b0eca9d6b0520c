"""LLaDA-MoE-7B-A1B, the first stage of its pre-training (arXiv 2509.24389, section 3).

From the paper: the model, from scratch; 10T tokens of text; rows of 4,096 tokens with rotary base
10,000, 1% of them cropped to a length of U{8..4096}; one time t ~ U(0, 1) per row, weight 1 / t;
balance loss 0.01 and router z-loss 0.001. The paper does not publish batch size, learning rate and
its schedule, optimizer or precision; ours, marked below, are those of its nearest published
relatives. Not run by us: it is what `lladax.plan` plans.

  python -m lladax.plan --experiment=pretrain_llada_moe --topology=v5p:4x4x4 --tokens=10e12
  python -m experiments.pretrain_llada_moe --set data.corpus=text/*.jsonl --set data.tokenizer=...
"""

from __future__ import annotations

import pathlib

from lladax.data import DataConfig
from lladax.diffusion import Objective
from lladax.experiment import Experiment, main, open_run
from lladax.experiment import train as train_run
from lladax.infer import SamplerConfig
from lladax.models import llada_moe_7b_a1b
from lladax.sharding import MeshConfig
from lladax.train import Constant, OptimizerConfig

TOKENS = 10e12  # of this stage
LENGTH = 4096
BATCH = 1024  # ours: 4.2M tokens per step, as OLMoE (arXiv 2409.02060), its autoregressive twin


def config() -> Experiment:
  return Experiment(
    name="pretrain_llada_moe",
    # Ours: bfloat16 compute with float32 parameters and optimizer state, every layer recomputed.
    model=llada_moe_7b_a1b(
      rope_theta=10_000.0, max_position_embeddings=LENGTH, dtype="bfloat16", param_dtype="float32",
      remat="full",
    ),
    data=DataConfig(
      # Ours: the paper's text is not public. Name your own, with the tokenizer of the release.
      corpus="shakespeare",
      tokenizer="bytes",
      length=LENGTH,
      batch_size=BATCH,
      random_length=0.01,
      shortest=8,
    ),
    objective=Objective(balance_loss=0.01, z_loss=0.001),
    # Ours: AdamW as LLaDA-8B (arXiv 2502.09992): 2,000 updates to 4e-4, then constant; clipping.
    optimizer=OptimizerConfig(
      peak=4e-4, schedule=Constant(warmup=2000), weight_decay=0.1, clip=1.0
    ),
    sampler=SamplerConfig(gen_length=1024, steps=1024, block_length=64),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=round(TOKENS / (BATCH * LENGTH)),
    log_every=10,
    eval_every=5000,
    save_every=1000,
  )  # fmt: skip


def train(cfg: Experiment, workdir: pathlib.Path):
  with open_run(cfg, workdir) as run:
    train_run(run)


if __name__ == "__main__":
  main(config, train)
