"""A picture of one run, or of several that followed each other: what it learned, and how.

  pip install -e '.[demo]'
  python -m experiments.plot_runs runs/reasoning/pretrain runs/reasoning/extend --target=curves.png

Loss on masked tokens, the bound on held-out text, learning rate, and how evenly the experts are used
by noise level: the load of the busiest expert over the mean, for each eighth of t.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

import numpy as np

from lladax.train import read_records


def curves(workdirs: list[pathlib.Path]) -> list[dict]:
  """The records of runs in a row, `tokens` counted on from run to run.

  Raises:
    FileNotFoundError: for a directory without records.
  """
  found, before = [], 0
  for workdir in workdirs:
    records = read_records(workdir)
    if not records:
      raise FileNotFoundError(
        f"{workdir} has no records (metrics.jsonl): is it the workdir of a run?"
      )
    per_step = next((r["tokens"] / r["step"] for r in records if "tokens" in r), 0)
    found += [
      {**record, "tokens": before + record["step"] * per_step, "run": workdir.name}
      for record in records
    ]
    before = found[-1]["tokens"]
  return found


def series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
  pairs = [(r["tokens"], r[name]) for r in records if r.get(name) is not None]
  return np.array([t for t, _ in pairs]), np.array([np.asarray(y, float) for _, y in pairs])


def smooth(values: np.ndarray, window: int = 9) -> np.ndarray:
  """Running median: of noisy losses the level."""
  half = window // 2
  return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def plot(records: list[dict], target: pathlib.Path):
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True)
  runs = list(dict.fromkeys(record["run"] for record in records))
  for index, run in enumerate(runs):
    own, color = [r for r in records if r["run"] == run], f"C{index}"
    tokens, loss = series(own, "masked_nll")
    axes[0, 0].plot(tokens, loss, color=color, alpha=0.25, linewidth=0.8)
    axes[0, 0].plot(tokens, smooth(loss), color=color, label=run)
    name = (
      "heldout/bits_per_byte" if series(own, "heldout/bits_per_byte")[0].size else "heldout/nll"
    )
    tokens, bound = series(own, name)
    scale = 1 if name.endswith("byte") else 1 / math.log(2)
    unit = "byte" if name.endswith("byte") else "token"
    axes[0, 1].plot(
      tokens, scale * bound, color=color, marker="o", markersize=3, label=f"{run}, {unit}"
    )
    axes[1, 0].plot(*series(own, "learning_rate"), color=color)
  tokens, load = series(records, "load_max_over_mean_by_t")  # [records, n, buckets]
  if load.size:
    # NaN where no row of a record was: left out, as is a level that no layer has.
    busiest = np.where(np.isnan(load), -np.inf, load).max(1)
    busiest[np.isinf(busiest)] = np.nan
    for bucket in range(busiest.shape[1]):
      color = plt.cm.viridis(bucket / (busiest.shape[1] - 1))
      axes[1, 1].plot(tokens, smooth(busiest[:, bucket], 15), color=color, linewidth=1)
    scale = plt.cm.ScalarMappable(cmap="viridis", norm=plt.Normalize(0, 1))
    figure.colorbar(scale, ax=axes[1, 1], label="noise level t")
  titles = (
    ("loss on masked tokens, nats", "held-out bound, bits"),
    ("learning rate", "busiest expert / mean, worst layer"),
  )
  for row in range(2):
    for column in range(2):
      axes[row, column].set_title(titles[row][column], fontsize=10)
      axes[row, column].set_xlabel("tokens")
      axes[row, column].grid(alpha=0.3)
  axes[0, 0].legend()
  axes[0, 1].legend()
  target.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(target, dpi=110)


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path, help="of runs, in their order")
  parser.add_argument("--target", type=pathlib.Path, default=pathlib.Path("curves.png"))
  options = parser.parse_args(arguments)
  try:
    plot(curves(options.workdirs), options.target)
  except FileNotFoundError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"wrote {options.target}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
