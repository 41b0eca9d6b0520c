"""LLaDA-MoE-7B-A1B-Instruct: supervised fine-tuning on question-answer pairs (arXiv 2509.24389, 3).

From the paper and LLaDA's published guidelines: prompts are never masked; of a conversation with
several answers one is drawn, what comes later is cut; end-of-text tokens that pad a row to the
longest of its batch belong to the answer; the loss of an answer is divided by its length; rows of at
most 4,096 tokens although the model reads 8,192, since padding to 8,192 would flood the answers with
end of text; three epochs. The paper does not publish data, batch size, learning rate, schedule or
optimizer: ours, marked below, are those of LLaDA-8B (arXiv 2502.09992). Not run by us at this size;
its toy twin is, in the tests.

| stage | what |
|---|---|
| sft | as above, beginning with the last stage of `experiments.pretrain_llada_moe` |
| sft_packed | several conversations in a row of 8,192, each a segment of its own, as LLaDA-MoE v2 packs (arXiv 2608.03457) |

  python -m experiments.sft_llada_moe --set data.conversations='data/sft/*.jsonl'
  python -m experiments.sft_llada_moe --set start="Start(path='inclusionAI/LLaDA-MoE-7B-A1B-Base')" \\
    --set data.tokenizer=weights/base --set data.conversations='data/sft/*.jsonl'
  python -m experiments.sft_llada_moe --config=sft:debug --workdir=runs/sft_debug
"""

from __future__ import annotations

import dataclasses
import pathlib

from lladax.diffusion import Objective, ResponseLength
from lladax.experiment import Experiment, Start, heldout_hook, main, open_run
from lladax.experiment import train as train_run
from lladax.infer import SamplerConfig
from lladax.models import llada_moe_7b_a1b, tiny
from lladax.sharding import MeshConfig
from lladax.train import OptimizerConfig, Wsd
from lladax.tune import ConversationConfig

STAGES = ("sft", "sft_packed")
EPOCHS = 3
# Ours: as many pairs as LLaDA-8B was fine-tuned on. Say how many yours are with `--set steps=...`.
PAIRS = 4_500_000
BATCH = 256  # ours: as LLaDA-8B
TOY = pathlib.Path(__file__).with_name("toy_conversations.jsonl")


def config(stage: str = STAGES[0], debug: bool = False) -> Experiment:
  """One stage; `debug` is the same with a tiny model, forty conversations and a dozen steps."""
  stages = {"sft": sft()}
  stages["sft_packed"] = sft_packed(stages["sft"])
  return toy(stages[stage], stage) if debug else stages[stage]


def sft() -> Experiment:
  return Experiment(
    name="llada_moe/sft",
    # Ours: precision and recomputation, as in pre-training.
    model=llada_moe_7b_a1b(
      rope_theta=50_000.0, max_position_embeddings=8192, dtype="bfloat16", param_dtype="float32",
      remat="full",
    ),
    start=Start(stage="anneal_2", optimizer="reset", data="restart"),
    data=ConversationConfig(
      # Ours: the paper's pairs are not public. Name your own.
      conversations="data/sft/*.jsonl",
      template="llada_moe",
      length=4096,
      batch_size=BATCH,
      eos_padding="batch",
      # Ours: the paper limits each sample, and does not say what happens to longer ones.
      too_long="drop",
      heldout=0.001,
    ),
    # Ours: the router's losses go on, as in LLaDA-MoE v2.
    objective=Objective(normalize=ResponseLength(), balance_loss=0.01, z_loss=0.001),
    # Ours: as LLaDA-8B, 50 updates to 2.5e-5, constant, the last tenth linear to 2.5e-6.
    optimizer=OptimizerConfig(
      peak=2.5e-5, schedule=Wsd(warmup=50, decay_fraction=0.1, final=0.1), weight_decay=0.1, clip=1.0
    ),
    sampler=SamplerConfig(gen_length=1024, steps=1024, block_length=64),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=EPOCHS * PAIRS // BATCH,
    log_every=10,
    eval_every=1000,
    save_every=1000,
  )  # fmt: skip


def sft_packed(whole: Experiment) -> Experiment:
  data = dataclasses.replace(
    whole.data,
    packing=True,
    length=8192,
    eos_padding="none",
    eos_tail=64,  # ours: up to a block of the sampler
    batch_size=BATCH // 2,  # ours: as many tokens
  )
  # Ours: four and a half conversations of 1,800 tokens in a row.
  steps = round(EPOCHS * PAIRS / (data.batch_size * 4.5))
  return dataclasses.replace(whole, name="llada_moe/sft_packed", data=data, steps=steps)


def toy(whole: Experiment, stage: str) -> Experiment:
  """The stage at a size for a CPU, from fresh parameters: `--set start=...` begins elsewhere."""
  length = whole.data.length // 32
  return dataclasses.replace(
    whole,
    name=f"llada_moe_debug/{stage}",
    model=tiny(num_hidden_layers=1, hidden_size=64, rope_theta=whole.model.rope_theta),
    start=None,
    data=dataclasses.replace(
      whole.data,
      conversations=str(TOY),
      tokenizer="bytes",
      length=length,
      batch_size=8,
      heldout=0.2,
      eos_tail=whole.data.eos_tail // 8,
    ),
    optimizer=OptimizerConfig(
      peak=3e-3, schedule=dataclasses.replace(whole.optimizer.schedule, warmup=2)
    ),
    sampler=SamplerConfig(gen_length=16, steps=8, block_length=16),
    mesh=MeshConfig(),
    steps=12,
    log_every=2,
    eval_every=6,
    save_every=6,
  )


def train(cfg: Experiment, workdir: pathlib.Path):
  with open_run(cfg, workdir) as run:
    train_run(run, [heldout_hook(run)])


if __name__ == "__main__":
  main(config, train, stages=STAGES)
