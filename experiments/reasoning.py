"""From text to a model that answers: two stages of pre-training, fine-tuning, and a score, on a CPU.

Grade-school problems of reasoning-gym's `gsm_symbolic` with small numbers and worked answers. The
text of the problems is prepared as packed rows of two lengths; `pretrain` reads rows of 64 tokens,
`extend` goes on with rows of 128 and a larger rotary base, `sft` learns to answer in a chat template.
Each stage starts from the one before. None of the held-out problems is in the training text.

  pip install -e '.[hub,reasoning]'
  python -m experiments.reasoning_data --target=data/reasoning --tasks=gsm_easy --train=20000
  for length in 64 128; do python -m lladax.data prepare --source=data/reasoning/text.jsonl \\
    --tokenizer=data/reasoning/tokenizer --length=$length --target=data/reasoning/$length; done
  python -m experiments.reasoning --config=all --workdir=runs/reasoning
  python -m experiments.plot_runs runs/reasoning/pretrain runs/reasoning/extend runs/reasoning/sft
  python -m lladax.hub export --source=runs/reasoning/sft --target=exported

Model and learning rates are ours, chosen by trying, for minutes on two cores. README has the result.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from rich.console import Console
from rich.table import Table

from experiments import reasoning_data
from lladax import host
from lladax.data import PreparedConfig, Source
from lladax.data.conversations import read_conversations
from lladax.diffusion import Antithetic, Objective, ResponseLength, Unweighted
from lladax.experiment import Experiment, Start, heldout_hook, main, open_run
from lladax.experiment import train as train_run
from lladax.infer import SamplerConfig
from lladax.loading import load
from lladax.model import Model
from lladax.models import tiny
from lladax.moe import MoEConfig
from lladax.train import OptimizerConfig, Wsd
from lladax.tune import ConversationConfig

STAGES = ("pretrain", "extend", "sft")
DATA = "data/reasoning"
SCORED = 200  # held-out problems


def config(stage: str = STAGES[0], debug: bool = False) -> Experiment:
  """One stage; `debug` takes a few steps of each."""
  made = {"pretrain": pretrain()}
  made["extend"] = extend(made["pretrain"])
  made["sft"] = sft(made["extend"])
  if not debug:
    return made[stage]
  few = {"steps": 12, "log_every": 2, "eval_every": 6, "save_every": 6}
  optimizer = dataclasses.replace(made[stage].optimizer, schedule=Wsd(warmup=2))
  return dataclasses.replace(
    made[stage], name=f"reasoning_debug/{stage}", optimizer=optimizer, **few
  )


def pretrain() -> Experiment:
  return Experiment(
    name="reasoning/pretrain",
    model=tiny(
      vocab_size=1088,  # the text's BPE of 1,024, and room for a template's tokens
      hidden_size=128,
      num_hidden_layers=3,
      num_attention_heads=4,
      moe=MoEConfig(num_experts=8, num_experts_per_tok=2, expert_intermediate_size=128),
      max_position_embeddings=64,
      rope_theta=10_000.0,
    ),
    data=PreparedConfig(sources=(Source(path=f"{DATA}/64"),), length=64, batch_size=16),
    # Every masked token counts the same: it learns faster at first (arXiv 2510.03280).
    objective=Objective(times=Antithetic(), weight=Unweighted()),
    optimizer=OptimizerConfig(peak=4e-3, schedule=Wsd(warmup=50, decay_fraction=0.2, final=0.25)),
    sampler=SamplerConfig(gen_length=64, steps=64, block_length=64),
    steps=2400,
    log_every=10,
    eval_every=300,
    save_every=300,
  )


def extend(before: Experiment) -> Experiment:
  return dataclasses.replace(
    before,
    name="reasoning/extend",
    start=Start(stage="pretrain", optimizer="keep"),
    model=dataclasses.replace(before.model, max_position_embeddings=192, rope_theta=50_000.0),
    data=PreparedConfig(sources=(Source(path=f"{DATA}/128"),), length=128, batch_size=8),
    optimizer=OptimizerConfig(peak=3e-3, schedule=Wsd(warmup=20, decay_fraction=0.4)),
    steps=1200,
    seed=1,
  )


def sft(before: Experiment) -> Experiment:
  return dataclasses.replace(
    before,
    name="reasoning/sft",
    start=Start(stage="extend", data="restart"),
    data=ConversationConfig(
      conversations=f"{DATA}/train.jsonl",
      heldout_conversations=f"{DATA}/heldout.jsonl",
      template="chatml",
      length=128,
      batch_size=16,
      eos_padding="length",  # the sampler's canvas is as long
      too_long="drop",
    ),
    objective=dataclasses.replace(before.objective, normalize=ResponseLength()),
    optimizer=OptimizerConfig(peak=3e-3, schedule=Wsd(warmup=50, decay_fraction=0.5)),
    steps=1800,
    seed=2,
  )


def train(cfg: Experiment, workdir: pathlib.Path):
  host.keep_memory()
  with open_run(cfg, workdir) as run:
    train_run(run, [heldout_hook(run, mc_num=4, max_batches=8)])


def evaluate(cfg: Experiment, workdir: pathlib.Path):
  """Answers held-out problems, marks them and keeps them in `<workdir>/answers.jsonl`."""
  if cfg.model.max_position_embeddings < 2 * cfg.sampler.gen_length:
    print(f"{cfg.name} reads rows too short to answer in")
    return
  held = list(read_conversations(f"{DATA}/heldout.jsonl"))[:SCORED]
  model = load(workdir)
  answers = answer(model, [conversation.messages[0].content for conversation in held])
  lines = [
    {
      "question": conversation.messages[0].content,
      "answer": text,
      "right": reasoning_data.is_right(conversation, text),
    }
    for conversation, text in zip(held, answers, strict=True)
  ]
  share = sum(line["right"] for line in lines) / len(lines)
  (pathlib.Path(workdir) / "answers.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )
  console = Console()
  console.rule(f"{cfg.name}: {share:.1%} of {len(held)} held-out problems right")
  table = Table("question", "answer", "", show_lines=True)
  for line in lines[:4]:
    table.add_row(line["question"], line["answer"], "right" if line["right"] else "wrong")
  console.print(table)


def answer(model: Model, questions: list[str]) -> list[str]:
  """A fine-tuned model chats; one that only read text continues it, a question and its answer."""
  if model.conversation is not None:
    prompts = [model.conversation.encode([{"role": "user", "content": q}]) for q in questions]
  else:
    prompts = [model.tokenizer.encode(f"{question}\n") for question in questions]
  return [model.decode(row) for row in model.generate_tokens(prompts).answers]


if __name__ == "__main__":
  main(config, train, evaluate, stages=STAGES)
