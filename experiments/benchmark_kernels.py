"""Speed of the kernels on the device at hand, beside the same operations of others, in one run.

Grouped matmul (forward and both gradients), SwiGLU, dispatch and combine at the shape of one
LLaDA-MoE layer (65536 rows, 64 experts, 2048 x 1024) in bfloat16, the decoding layer, attention and
the head's loss. Others: `jax.lax.ragged_dot`, tokamax and torch where they are installed. Beside
them what a dense product and a copy reach on this device in this run, and what others published.

  python -m experiments.benchmark_kernels --json=kernels.json       (a GPU or TPU: some minutes)
  python -m experiments.benchmark_kernels --size=small              (a CPU: a minute)

A time is the median over `--rounds` of batches of calls, waited for once; operands take turns, so
that no cache holds them from the call before. `difference` is the greatest from the first
implementation that ran, over the greatest number of its result.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import time

from absl import app, flags

# torch needs memory on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark_kernel_cases import CASES, SIZES, Case, Setting, draw

CACHE = 128 << 20  # bytes: more than any of these devices caches

# From tokamax's autotuning data for H100 (0.0.17: nvidia_h100_80gb_hbm3), in TFLOP/s.
ANCHORS = (
  ("dlhs", "Mosaic GPU, 131072 x [128, 2048, 768] and x [128, 4096, 1536]", "296 and 346"),
  ("dlhs", "Triton, the same", "164 and 259"),
  ("drhs", "Mosaic GPU, the same", "108 and 112"),
  ("drhs", "Triton, the same", "551 and 580"),
  ("fwd", "Mosaic GPU, 131072 x [256, 7168, 1024]", "419"),
  ("fwd", "Triton, 8192 x [8, 4096, 14336]", "649"),
  ("attention fwd", "cuDNN, 16 heads of 128, full mask", "692"),
  ("attention bwd", "Mosaic GPU, 16 heads of 128, full mask", "455"),
)

FLAGS = flags.FLAGS
flags.DEFINE_enum(
  "size", None, list(SIZES), "Of the operands; default: llada_moe, or small on a CPU."
)
flags.DEFINE_multi_enum("ops", list(CASES), list(CASES), "What to time; repeat the flag.")
flags.DEFINE_integer("rounds", 10, "Batches of calls that are timed.", lower_bound=1)
flags.DEFINE_float("batch_seconds", 0.1, "Least time of a batch of calls.", lower_bound=0.0)
flags.DEFINE_float("skew", 0.0, "Expert e gets slots as (e + 1)^-skew.", lower_bound=0.0)
flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Default: bfloat16; float32 on a CPU.")
flags.DEFINE_bool("torch", True, "Time torch as well, where it can be imported.")
flags.DEFINE_string("json", None, "File to write the results to.")


def setting() -> Setting:
  here = jax.default_backend()
  size = SIZES[FLAGS.size or ("small" if here == "cpu" else "llada_moe")]
  dtype = FLAGS.dtype or ("float32" if here == "cpu" else "bfloat16")
  return dataclasses.replace(size, dtype=dtype, skew=FLAGS.skew, torch=FLAGS.torch)


def about() -> dict:
  """The device, and the versions of what runs on it."""
  device, versions = jax.devices()[0], {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "libtpu", "tokamax", "torch"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return dict(platform=device.platform, device=device.device_kind, versions=versions)


def seconds(case: Case) -> tuple[float, object]:
  """The median time of a call, and the result of the first."""
  first = case.make(0)
  size = sum(x.nbytes for x in jax.tree.leaves(first))
  copies = int(np.clip(CACHE // max(size, 1) + 1, 2, 8))
  operands = [first, *(case.make(turn) for turn in range(1, copies))]
  result = case.run(*first)
  case.wait(result)
  start = time.perf_counter()
  case.wait(case.run(*operands[-1]))
  once = time.perf_counter() - start
  calls = max(1, min(1000, round(FLAGS.batch_seconds / max(once, 1e-6))))
  turns = itertools.cycle(operands)
  times = []
  for _ in range(FLAGS.rounds):
    start = time.perf_counter()
    for _ in range(calls):
      last = case.run(*next(turns))
    case.wait(last)
    times.append((time.perf_counter() - start) / calls)
  return statistics.median(times), result


def ceilings(chosen: Setting) -> dict[str, float]:
  """What a dense product (FLOP/s) and a copy (bytes/s, read and written) reach on this device."""
  sides, numbers = [(chosen.dense, chosen.dense)] * 2, chosen.copied // 4
  product = Case(
    name="dense product",
    implementation="jax.numpy",
    run=jax.jit(jnp.dot),
    make=lambda turn: draw(*sides, turn=turn, dtype=chosen.dtype),
    flops=2.0 * chosen.dense**3,
  )
  copy = Case(
    name="copy",
    implementation="jax.numpy",
    run=jax.jit(lambda x: -x),
    make=lambda turn: draw((numbers // 128, 128), turn=turn, dtype="float32"),
    bytes=2.0 * 4 * numbers,
  )
  return {
    "flops": product.flops / seconds(product)[0],
    "bytes": copy.bytes / seconds(copy)[0],
  }


def difference(a, b) -> float:
  """The greatest, over the greatest number of `b`, of trees of arrays."""
  worst = 0.0
  # What is kept for the backward pass comes last and may be packed otherwise.
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
  for x, y in (pair for pair in pairs if pair[0].shape == pair[1].shape):
    x, y = (np.asarray(t, np.float32) for t in (x, y))
    worst = max(worst, float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)))
  return worst


def measure(case: Case, limits: dict[str, float], first: dict) -> dict:
  """A row of the table; `first`: results by name, to compare with."""
  row = dict(op=case.name, implementation=case.implementation)
  try:
    time_taken, result = seconds(case)
    result = jax.tree.map(lambda x: np.asarray(x, np.float32), case.fetch(result))
  except Exception as error:  # one that cannot run here must not keep the others from running
    return row | dict(error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
  row |= dict(ms=1e3 * time_taken, of_ceiling=0.0)
  for name, amount in (("flops", case.flops), ("bytes", case.bytes)):
    if amount:
      speed = amount / time_taken
      row |= {name + "_per_second": speed}
      row["of_ceiling"] = max(row["of_ceiling"], speed / limits[name])
  if case.name in first:
    row["difference"] = difference(result, first[case.name])
  first.setdefault(case.name, result)
  return row


def line(row: dict) -> str:
  start = f"{row['op']:<28}{row['implementation']:<32}"
  if "error" in row:
    return start + row["error"]
  parts = [f"{row['ms']:>10.3f}"]
  for name, scale in (("flops_per_second", 1e12), ("bytes_per_second", 1e9)):
    parts.append(f"{row[name] / scale:>10.3f}" if name in row else " " * 10)
  parts.append(f"{100 * row['of_ceiling']:>8.0f}%")
  parts.append(f"{row['difference']:>12.1e}" if "difference" in row else "")
  return start + "".join(parts)


def main(_):
  chosen, report = setting(), about()
  print(json.dumps(report), flush=True)
  limits = ceilings(chosen)
  print(
    f"ceilings of this run: a {chosen.dtype} product of {chosen.dense}^3 "
    f"{limits['flops'] / 1e12:.2f} TFLOP/s, a copy {limits['bytes'] / 1e9:.1f} GB/s\n"
    f"{'':<60}{'ms':>10}{'TFLOP/s':>10}{'GB/s':>10}{'ceiling':>9}{'difference':>12}",
    flush=True,
  )
  rows, first = [], {}
  for name in FLAGS.ops:
    for case in CASES[name](chosen):
      rows.append(measure(case, limits, first))
      print(line(rows[-1]), flush=True)
    first.clear()
  print("\npublished, H100, bfloat16 (tokamax 0.0.17, its autotuning data), TFLOP/s:")
  for anchor in ANCHORS:
    print("  {:<16}{:<64}{}".format(*anchor))
  report |= dict(setting=dataclasses.asdict(chosen), ceilings=limits, rows=rows, anchors=ANCHORS)
  if FLAGS.json:
    with open(FLAGS.json, "w") as file:
      json.dump(report, file, indent=1)


if __name__ == "__main__":
  app.run(main)
