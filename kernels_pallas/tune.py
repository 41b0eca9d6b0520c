"""Times tilings of the grouped matmul on the device at hand and keeps the best of each.

  python -m kernels_pallas.tune                                     (LLaDA-MoE: 65536 rows)
  python -m kernels_pallas.tune --rows=32768 --experts=256 --model=4096 --ffn=1024

What is kept is found again wherever the same kind of device meets the same shapes: rows are taken
to the next power of two, the rest exactly. It lies below `$LLADAX_CACHE` (or ~/.cache/lladax), in
tilings/<device kind>.json; every host of a run needs the same file. Interrupted, it has kept what
was finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import op
from kernels_pallas.grouped_matmul import api

PASSES = ("forward", "forward_transposed", "swiglu", "gradient_rhs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """One pass of one implementation on one shape.

  Attributes:
    implementation: of `kernels_pallas.grouped_matmul`, one that has tilings.
    step: one of `PASSES`.
    rows: R.
    experts: E.
    inner: D, width of the rows of lhs.
    outer: the last axis of rhs (transposed: its middle one), or of the rows of grad.
    dtype: of all arrays.
  """

  implementation: str
  step: str
  rows: int
  experts: int
  inner: int
  outer: int
  dtype: str

  @property
  def key(self) -> str:
    name = f"grouped_matmul.{self.implementation}.{self.step}"
    return op.table_key(name, self.shape, self.dtype)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return self.rows, self.experts, self.inner, self.outer

  @property
  def flops(self) -> float:
    return 2.0 * self.rows * self.inner * self.outer

  def candidates(self) -> tuple[op.Tiling | None, ...]:
    """None, the default, comes first."""
    found = api.backend(self.implementation).candidates(self.shape, jnp.dtype(self.dtype))
    if self.implementation == "pallas_tpu" and self.step != "gradient_rhs":
      found = [tiling for tiling in found if not tiling.depth]
    return None, *dict.fromkeys(found)

  def function(self, tiling: op.Tiling | None) -> Callable:
    """The pass, of the arrays of `operands`."""
    backend, static = api.backend(self.implementation), dict(tiling=tiling)
    if self.step == "gradient_rhs":
      return functools.partial(backend.gradient_rhs, dtype=jnp.dtype(self.dtype), **static)
    if self.step == "swiglu":
      return functools.partial(backend.swiglu, keep=True, **static)
    transposed = self.step == "forward_transposed"
    return functools.partial(backend.forward, transpose_rhs=transposed, **static)

  def operands(self) -> tuple[jax.Array, ...]:
    """Random rows for experts drawn at random."""
    experts = np.random.default_rng(0).integers(0, self.experts, self.rows)
    sizes = jnp.asarray(np.bincount(experts, minlength=self.experts), jnp.int32)
    other = (self.experts, self.inner, self.outer)
    if self.step == "gradient_rhs":
      other = (self.rows, self.outer)
    elif self.step == "forward_transposed":
      other = (self.experts, self.outer, self.inner)
    shapes = (self.rows, self.inner), other
    keys = jax.random.split(jax.random.key(0), 2)
    arrays = (jax.random.normal(key, s, self.dtype) for key, s in zip(keys, shapes, strict=True))
    return *arrays, sizes


def layer(implementation: str, rows: int, experts: int, model: int, ffn: int, dtype: str):
  """All `Work` of an expert layer [R, model], forward and backward."""
  for step, inner, outer in (
    ("swiglu", model, 2 * ffn),
    ("forward", ffn, model),
    ("forward_transposed", model, ffn),
    ("forward_transposed", 2 * ffn, model),
    ("gradient_rhs", ffn, model),
    ("gradient_rhs", model, 2 * ffn),
  ):
    yield Work(
      implementation=implementation,
      step=step,
      rows=rows,
      experts=experts,
      inner=inner,
      outer=outer,
      dtype=dtype,
    )


def seconds(function: Callable, operands, repeats: int, give_up: float = math.inf) -> float:
  """Least time of a call, from batches of calls waited for once; give_up: stop at one so slow."""
  run = jax.jit(function)
  jax.block_until_ready(run(*operands))
  best = math.inf
  for _ in range(3):
    start = time.perf_counter()
    for _ in range(repeats):
      out = run(*operands)
    jax.block_until_ready(out)
    best = min(best, (time.perf_counter() - start) / repeats)
    if best > give_up:
      break
  return best


def best_tiling(
  work: Work, candidates: Iterable, repeats: int, report: Callable
) -> tuple[op.Tiling | None, float, int]:
  """-> the fastest, its seconds, and how many candidates could not be compiled or run.

  Raises:
    RuntimeError: if none could.
  """
  operands = work.operands()
  best, least, failed, last = None, math.inf, 0, None
  candidates = tuple(candidates)
  for number, tiling in enumerate(candidates, 1):
    try:
      taken = seconds(work.function(tiling), operands, repeats, give_up=2 * least)
    except Exception as error:  # compilers and drivers raise whatever they like
      failed, last = failed + 1, error
      continue
    if taken < least:
      best, least = tiling, taken
      report(f"  {number}/{len(candidates)}  {1e3 * taken:.3f} ms  {tiling or 'the default'}")
  if least == math.inf:
    raise RuntimeError(f"no tiling of {work} works here; the last said: {last}") from last
  return best, least, failed


def tune(works: Iterable[Work], repeats: int, report: Callable = print) -> dict[str, op.Tiling]:
  """Times every candidate of every work and saves what beats the default."""
  found, kind = {}, op.target_device_kind()
  for work in works:
    report(f"{work.key}: {len(work.candidates())} candidates on {kind}")
    tiling, taken, failed = best_tiling(work, work.candidates(), repeats, report)
    if tiling is not None:
      found[work.key] = tiling
      op.save(kind, {work.key: tiling})
    report(
      f"  best: {tiling or 'the default'}, {1e3 * taken:.3f} ms, "
      f"{work.flops / taken / 1e12:.1f} TFLOP/s; {failed} did not fit"
    )
  return found


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m kernels_pallas.tune",
    description=__doc__.split("\n\n")[0],
    epilog=f"Kept in {op.table_path('<device kind>').parent}, one file per kind of device.",
  )
  names = sorted(api.PLATFORMS)
  parser.add_argument("--rows", type=int, default=65536, help="tokens times experts per token")
  parser.add_argument("--experts", type=int, default=64, help="experts on one device")
  parser.add_argument("--model", type=int, default=2048, help="width of the model")
  parser.add_argument("--ffn", type=int, default=1024, help="width of one expert")
  parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
  parser.add_argument("--implementation", choices=names, help="default: all that run here")
  parser.add_argument("--repeats", type=int, default=10, help="calls per timing")
  options = parser.parse_args(arguments)
  platform = op.target_platform()
  here = [name for name in names if api.PLATFORMS[name] == platform]
  chosen = [options.implementation] if options.implementation else here
  if not here or not set(chosen) <= set(here):
    parser.error(
      f"nothing to time: {op.target_device_kind()!r} runs {here or 'none of the tiled kernels'}, "
      f"asked for {chosen or 'all'}; run this on a TPU or GPU"
    )
  for name in chosen:
    sizes = options.rows, options.experts, options.model, options.ffn, options.dtype
    tune(layer(name, *sizes), options.repeats)
  print(f"kept in {op.table_path(op.target_device_kind())}")


if __name__ == "__main__":
  main()
