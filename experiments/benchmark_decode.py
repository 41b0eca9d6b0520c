"""Speed of decoding on this machine: lladax by cache and rule, beside the plain LLaDA loop in torch.

The plain loop is LLaDA's own (arXiv 2502.09992): the whole canvas in every pass, nothing kept, the
most confident tokens written first. Both sides have the same weights, prompts, blocks and steps, and
take turns in processes of their own, one answer each, so that a slow moment of the machine hits all.
In torch the network is a Qwen3-MoE of `transformers`, which computes what LLaDA-MoE computes (with
full attention passed in as a mask), its experts as published (a loop), on a GPU as `grouped_mm` too.

  pip install -e '.[bench]' && python -m experiments.benchmark_decode --json=decode.json

Without a GPU the network is the 25M proxy in float32; with one random weights of LLaDA-MoE-7B-A1B's
true shape in bfloat16, 1024 tokens after the prompt in blocks of 64. `--model=runs/tiny_text` takes a
trained one. Random weights are never sure of anything: how much the rules that go by
confidence (`Threshold`) then write means nothing, only their milliseconds per pass do.

Columns. NFE: passes of the network per answer. TPF: tokens before EOS per pass. tokens/s: of these
tokens, by the median answer; p50 and p95 of the seconds per answer. The floor of a pass is the longer
of two times: its weights (of the experts that its tokens chose, of everything else) and its keys and
values at the bandwidth of a copy, and its products at the speed of a large product, both measured in
the same process between the answers. compile: what the first answer took longer. agrees: of the
tokens, how many are those of the first side of the same steps without a cache.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import tempfile

from absl import app, flags

from experiments.benchmark_decode_sides import Ours, Setting, Torch, write_folder

# torch needs memory on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# As LLaDA decodes, then by cache at the same steps, then by rules that go by confidence.
OURS = (
  "",
  "cache=PrefixCache()",
  "cache=DualCache()",
  "cache=Vicinity()",
  "cache=DualCache() weights=int8",
  "cache=DualCache() unmask=Threshold(threshold=0.9)",
)

FLAGS = flags.FLAGS


def on_gpu() -> bool:
  """Asked of the system: the parent process must not hold the device."""
  return os.path.exists("/dev/nvidiactl")


def setting(folder: str) -> Setting:
  gpu = on_gpu()
  gen_length = FLAGS.gen_length or (1024 if gpu else 512)
  return Setting(
    size=FLAGS.size or ("7b" if gpu else "proxy"),
    model=FLAGS.model,
    prompt=FLAGS.prompt,
    prompt_length=FLAGS.prompt_length,
    gen_length=gen_length,
    block_length=FLAGS.block_length,
    steps=FLAGS.steps or gen_length // 8,
    batch=FLAGS.batch,
    folder=folder,
  )


def work(kind, chosen: Setting, names: list[str], pipe):
  """A worker: compiles its sides, then answers whenever it is asked."""
  try:
    side = kind(chosen, names)
    pipe.send("ready")
    while (request := pipe.recv()) != "stop":
      what, *args = request
      pipe.send(getattr(side, what)(*args))
  except Exception as error:
    pipe.send(error)
    raise


class Worker:
  """A process that holds some sides."""

  def __init__(self, context, kind, chosen: Setting, names: list[str]):
    self.pipe, theirs = context.Pipe()
    self.names = names
    self.process = context.Process(target=work, args=(kind, chosen, names, theirs), daemon=True)
    self.process.start()
    self._receive()

  def ask(self, what: str, *args):
    self.pipe.send((what, *args))
    return self._receive()

  def stop(self):
    self.pipe.send("stop")
    self.process.join()

  def _receive(self):
    found = self.pipe.recv()
    if isinstance(found, Exception):
      raise found
    return found


def measure(workers: list[tuple[str, Worker]]) -> tuple[list[dict], dict]:
  """A row for each side, and what the device can do."""
  sides = [(framework, worker, name) for framework, worker in workers for name in worker.names]
  first = {}
  for framework, worker, name in sides:
    print(f"first answer of {framework} {name}", flush=True)
    first[framework, name] = worker.ask("run", name)
  times = {key: [] for key in first}
  limits = []
  for turn in range(FLAGS.rounds):
    print(f"round {turn + 1} of {FLAGS.rounds}", flush=True)
    for framework, worker, name in sides:
      times[framework, name].append(worker.ask("run", name)["seconds"])
    limits.append(workers[0][1].ask("ceilings"))
  limits = {key: statistics.median(each[key] for each in limits) for key in limits[0]}
  rows = []
  for framework, worker, name in sides:
    run = first[framework, name]
    seconds = times[framework, name]
    median = statistics.median(seconds)
    row = {
      "framework": framework, "side": name, "nfe": run["nfe"],
      "tokens": run["tokens"], "tpf": run["tokens"] / run["nfe"] / FLAGS.batch,
      "tokens_per_s": run["tokens"] / median, "ms_per_forward": 1e3 * median / run["nfe"],
      "p50_s": median, "p95_s": percentile(seconds, 0.95),
      "agrees": agreement(run["rows"], first[sides[0][0], sides[0][2]]["rows"]),
    }  # fmt: skip
    if framework == "lladax":
      floor = worker.ask("floor", name)
      row["compile_s"] = max(0.0, run["seconds"] - median)
      row |= {"bytes_per_forward": floor["bytes"], "flops_per_forward": floor["flops"]}
      seconds = max(floor["bytes"] / limits["bytes"], floor["flops"] / limits["flops"])
      row |= {"active_experts": floor["experts"], "floor_ms": 1e3 * seconds}
      row["over_floor"] = row["ms_per_forward"] / row["floor_ms"]
    rows.append(row)
  return rows, limits


def percentile(values: list[float], part: float) -> float:
  """The value that this part of them is at most, by the nearest rank."""
  ordered = sorted(values)
  return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


def agreement(rows: list[list[int]], others: list[list[int]]) -> float:
  pairs = [pair for a, b in zip(rows, others, strict=True) for pair in zip(a, b, strict=True)]
  return statistics.mean(a == b for a, b in pairs)


def report(rows: list[dict], limits: dict, about: dict):
  """The table, and what each side is against the fastest of torch."""
  print(f"\n{json.dumps(about)}")
  print(f"a copy {limits['bytes'] / 1e9:.1f} GB/s, a product {limits['flops'] / 1e12:.3f} TFLOP/s")
  print(
    f"{'':60}{'NFE':>5}{'TPF':>6}{'tokens/s':>10}{'ms/pass':>9}{'floor':>8}{'ratio':>7}"
    f"{'p50 s':>8}{'p95 s':>8}{'compile':>9}{'agrees':>8}"
  )
  for row in rows:
    floor = f"{row['floor_ms']:8.2f}{row['over_floor']:7.2f}" if "floor_ms" in row else " " * 15
    compiling = f"{row['compile_s']:.1f}s" if "compile_s" in row else ""
    print(
      f"{row['framework'] + ' ' + row['side']:60}{row['nfe']:5}{row['tpf']:6.2f}"
      f"{row['tokens_per_s']:10.1f}{row['ms_per_forward']:9.2f}{floor}{row['p50_s']:8.2f}"
      f"{row['p95_s']:8.2f}{compiling:>9}{row['agrees']:8.1%}"
    )
  torch = [row for row in rows if row["framework"] == "torch"]
  if torch:
    best = min(torch, key=lambda row: row["p50_s"])
    print(f"\ntimes as fast as torch {best['side']}: per answer, and per pass")
    for row in rows:
      if row["framework"] == "lladax":
        row["times_torch"] = row["tokens_per_s"] / best["tokens_per_s"]
        row["times_torch_per_forward"] = best["ms_per_forward"] / row["ms_per_forward"]
        print(f"{row['side']:60}{row['times_torch']:8.2f}{row['times_torch_per_forward']:8.2f}")


def main(_):
  context = multiprocessing.get_context("spawn")
  with tempfile.TemporaryDirectory(prefix="benchmark_decode_") as folder:
    chosen = setting(folder)
    print(chosen, flush=True)
    workers = [("lladax", Worker(context, Ours, chosen, FLAGS.ours))]
    torch = ["eager", "grouped_mm"][: 1 + on_gpu()] if FLAGS.torch is None else FLAGS.torch
    torch = [name for name in torch if name]
    if torch:
      writer = context.Process(target=write_folder, args=(chosen,))
      writer.start()
      writer.join()
      if writer.exitcode:
        raise SystemExit("the weights for torch could not be written; --torch= leaves it out")
    workers += [("torch", Worker(context, Torch, chosen, [name])) for name in torch]
    rows, limits = measure(workers)
    about = {
      "device": workers[0][1].ask("device"),
      "machine": platform.machine(),
      "cores": os.cpu_count(),
      "versions": versions(),
    }
    for _, worker in workers:
      worker.stop()
  report(rows, limits, about)
  if FLAGS.json:
    given = {"ours": FLAGS.ours, "torch": torch, "rounds": FLAGS.rounds}
    found = about | {
      "setting": dataclasses.asdict(chosen) | given,
      "ceilings": limits,
      "rows": rows,
    }
    with open(FLAGS.json, "w") as file:
      json.dump(found, file, indent=1)


def versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "torch", "transformers"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def define_flags():
  flags.DEFINE_enum(
    "size", None, ["proxy", "7b"], "Of the network. Default: 7b where there is a GPU."
  )
  flags.DEFINE_string("model", None, "Whatever lladax.load takes, instead of random weights.")
  flags.DEFINE_multi_string(
    "ours",
    list(OURS),
    "A side of lladax: fields of SamplerConfig, and weights=int8 or fp8, separated by blanks.",
  )
  flags.DEFINE_list(
    "torch",
    None,
    "torch's ways with experts; empty for none. Default: eager, on a GPU grouped_mm as well (on a CPU "
    "it takes longer).",
  )
  flags.DEFINE_string("prompt", None, "Text of the prompt, for a --model with a tokenizer.")
  flags.DEFINE_integer("prompt_length", 64, "Random tokens before the answer otherwise.")
  flags.DEFINE_integer("gen_length", None, "Default: 512; on a GPU 1024.")
  flags.DEFINE_integer("block_length", 64, "Tokens of a block.")
  flags.DEFINE_integer("steps", None, "Passes of an answer by budget. Default: gen_length / 8.")
  flags.DEFINE_integer("batch", 1, "Answers that are decoded together.", lower_bound=1)
  flags.DEFINE_integer("rounds", 5, "Answers of each side that are timed.", lower_bound=1)
  flags.DEFINE_string("json", None, "File to write the results to.")


if __name__ == "__main__":
  define_flags()
  app.run(main)
