"""LLaDA2.0-flash, 103B-A6.1B (arXiv 2512.15745), trained by plain masked diffusion at 4,096 tokens.

The released model was converted from Ling-flash-2.0; its stable phase trains on whole rows of 4,096
tokens (block size 4096), which is what this describes. The shape is the released one; batch size,
learning rate and precision are ours. Not run by us: it is what `lladax.plan` plans.

  python -m lladax.plan --experiment=pretrain_llada2_flash --topology=v5p:4x8x8
"""

from __future__ import annotations

import dataclasses
import pathlib

from experiments import pretrain_llada_moe
from lladax.experiment import Experiment, main
from lladax.models import llada2_flash
from lladax.train import Constant, OptimizerConfig

LENGTH = 4096
BATCH = 1024  # ours: 4.2M tokens per step


def config() -> Experiment:
  base = pretrain_llada_moe.config()
  return dataclasses.replace(
    base,
    name="pretrain_llada2_flash",
    model=llada2_flash(dtype="bfloat16", param_dtype="float32", remat="full"),
    data=dataclasses.replace(base.data, length=LENGTH, batch_size=BATCH),
    # Its router is balanced by a bias on the choice of experts, not by a loss.
    objective=dataclasses.replace(base.objective, balance_loss=0.0, z_loss=0.0),
    # Ours. A conversion starts from a trained model and wants a low rate.
    optimizer=OptimizerConfig(peak=1e-4, schedule=Constant(warmup=2000)),
    steps=round(1e12 / (BATCH * LENGTH)),
  )


def train(cfg: Experiment, workdir: pathlib.Path):
  pretrain_llada_moe.train(cfg, workdir)


if __name__ == "__main__":
  main(config, train)
