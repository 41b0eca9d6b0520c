"""Averages the parameters of a run's checkpoints into a workdir of their own.

Averaging the checkpoints of a constant learning rate does what a decay of it would have done:
warm-up, stable, merge (WSM, arXiv 2507.17634; the base models of Ling 2.0 and LLaDA2.0, arXiv
2512.15745, are merged so). The result is a workdir: it loads with `lladax.load`, a stage starts from
it, and training goes on in it.

  python -m lladax.average --source=runs/x --last=5 --target=runs/x_merged
  python -m lladax.average --source=runs/x --steps=800,900,1000 --weights=0.2,0.3,0.5 --target=...
  python -m lladax.average --source=runs/x --best=3 --metric=heldout/nll --target=...
  python -m lladax.average --source=runs/x --ema --target=runs/x_ema
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from lladax.config import ConfigError
from lladax.train import CheckpointError, evaluated, load_params
from lladax.train.arrays import describe_arrays
from lladax.train.checkpoint import saved_steps

WEIGHTS = ("equal", "sqrt")


def average_checkpoints(
  source: os.PathLike,
  target: os.PathLike,
  *,
  steps: Sequence[int],
  weights: str | Sequence[float] = "equal",
  ema: bool = False,
) -> epath.Path:
  """Writes the average to `target`, as the checkpoint of the last of the steps.

  Everything else of that checkpoint is taken over: tokenizer, config, place in the data, and the
  moments of the optimizer. One checkpoint and the sum are in memory at a time, the sum in float32.

  Args:
    source: the workdir of a run.
    target: where there is nothing yet.
    steps: of its checkpoints.
    weights: one beside each step, or a name, see `weights_of`.
    ema: average their running averages (`OptimizerConfig.ema`) instead of their parameters.

  Returns:
    The directory of the checkpoint.

  Raises:
    ConfigError: for steps without a checkpoint, weights that do not add up to 1, a target that is
      there, or running averages that were not kept; nothing is written.
    CheckpointError: if a checkpoint is damaged.
  """
  # Orbax takes absolute paths only.
  source, target = (epath.Path(path).expanduser().resolve() for path in (source, target))
  if isinstance(weights, str):
    steps = sorted(steps)
  # Numbers stand beside their steps, in whatever order these are given.
  pairs = sorted(zip(steps, weights_of(weights, len(steps)), strict=True))
  steps, weights = [step for step, _ in pairs], [weight for _, weight in pairs]
  if len(set(steps)) < len(steps):
    raise ConfigError(f"a step is averaged once; got {steps}")
  saved = saved_steps(source)
  if missing := [step for step in steps if step not in saved]:
    raise ConfigError(f"{source} has no checkpoint of steps {missing}; it has {saved or 'none'}")
  if not steps:
    raise ConfigError("there are no steps to average")
  if target.exists():
    raise ConfigError(f"{target} is there already; choose another target")
  last = source / "checkpoints" / str(steps[-1])
  total = None
  for step, weight in zip(steps, weights, strict=True):
    path = source / "checkpoints" / str(step)
    params = _read_ema(path) if ema else load_params(path).params
    part = jax.tree.map(lambda x: weight * np.asarray(x, np.float32), params)  # noqa: B023
    total = part if total is None else jax.tree.map(np.add, total, part)
  if ema:
    params = load_params(last).params
  total = jax.tree.map(lambda x, like: x.astype(like.dtype), total, params)
  record = {"source": os.fspath(source), "steps": steps, "weights": weights, "ema": ema}
  return _write(total, last, target, record)


def weights_of(weights: str | Sequence[float], count: int) -> list[float]:
  """Weights of `count` checkpoints from the first to the last.

  They stand for a decay of the learning rate: an update that c checkpoints have in them counts the
  sum of their weights. "equal" is a linear decay; "sqrt" is 1 - sqrt(x), which gives the first
  checkpoints most.

  Raises:
    ConfigError: for another name, another number of weights, or a sum that is not 1.
  """
  if weights == "equal":
    return [1 / count] * count if count else []
  if weights == "sqrt":
    return [math.sqrt((i + 1) / count) - math.sqrt(i / count) for i in range(count)]
  if isinstance(weights, str):
    raise ConfigError(f"weights are one of {WEIGHTS} or numbers; got {weights!r}")
  if len(weights) != count or not math.isclose(sum(weights), 1.0, rel_tol=1e-6):
    raise ConfigError(f"expected {count} weights that add up to 1; got {list(weights)}")
  return list(weights)


def best_steps(source: os.PathLike, count: int, metric: str) -> list[int]:
  """The `count` saved steps at which a recorded metric was lowest.

  Raises:
    ConfigError: if fewer checkpoints were evaluated.
  """
  values = evaluated(source, saved_steps(source), metric)
  if len(values) < count:
    raise ConfigError(
      f"{source} has {len(values)} checkpoints with a record of {metric!r} at their step, "
      f"{count} are asked for; save where you evaluate"
    )
  return sorted(sorted(values, key=lambda step: (values[step], step))[:count])


def _read_ema(path: epath.Path):
  """The running average in a checkpoint."""
  handler = ocp.StandardCheckpointHandler()
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    handler.metadata(path / "train").tree,
  )
  state = handler.restore(path / "train", args=ocp.args.StandardRestore(abstract))
  found = _find_ema(state["opt_state"])
  if found is None:
    raise ConfigError(f"{path} keeps no running average; train with optimizer.ema")
  return found


def _find_ema(tree):
  if isinstance(tree, Mapping):
    if "ema" in tree:
      return tree["ema"]
    parts = tree.values()
  else:
    parts = tree if isinstance(tree, list | tuple) else ()
  return next((ema for part in parts if (ema := _find_ema(part)) is not None), None)


def _write(params, last: epath.Path, target: epath.Path, record: dict) -> epath.Path:
  """The checkpoint `last` with other parameters, and its workdir; there when it is whole."""
  new = target.parent / f"{target.name}.new"
  if new.exists():
    new.rmtree()
  checkpoint = new / "checkpoints" / last.name
  checkpoint.mkdir(parents=True)
  _copy(last, checkpoint, without="params")
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    checkpointer.save(checkpoint / "params", args=ocp.args.StandardSave(params))
  described = checkpoint / "run" / "arrays.json"
  arrays = json.loads(described.read_text()) | {"params": describe_arrays(params)}
  described.write_text(json.dumps(arrays, indent=1))
  for name in ("config.json", "start.json"):  # of adapters, start.json says what they are for
    if (last.parent.parent / name).exists():
      (last.parent.parent / name).copy(new / name)
  (new / "average.json").write_text(json.dumps(record, indent=1) + "\n")
  new.rename(target)
  return target / "checkpoints" / last.name


def _copy(source: epath.Path, target: epath.Path, without: str = ""):
  for path in source.iterdir():
    if path.name == without:
      continue
    if path.is_dir():
      (target / path.name).mkdir()
      _copy(path, target / path.name)
    else:
      path.copy(target / path.name)


def main(argv: Sequence[str] | None = None) -> int:
  """The command: exit status 0, or 2 with one line for a mistake."""
  parser = argparse.ArgumentParser(
    prog="python -m lladax.average", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("--source", required=True, help="Workdir of a run.")
  parser.add_argument("--target", required=True, help="Workdir to write; nothing is there yet.")
  which = parser.add_mutually_exclusive_group()
  which.add_argument("--last", type=int, help="Average so many checkpoints, the newest.")
  which.add_argument("--steps", help="Average those of these steps: 800,900,1000.")
  which.add_argument("--best", type=int, help="Average so many, those with the lowest --metric.")
  parser.add_argument("--metric", default="heldout/nll", help="Of the run's records, for --best.")
  parser.add_argument(
    "--weights", default="equal",
    help="equal (stands for a linear decay), sqrt (for 1 - sqrt), or one number per checkpoint.",
  )  # fmt: skip
  parser.add_argument(
    "--ema", action="store_true",
    help="Take the running averages (optimizer.ema); without a choice of steps, the newest alone.",
  )  # fmt: skip
  flags = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of every file it moves
  try:
    path = average_checkpoints(
      flags.source, flags.target, steps=_steps(flags), weights=_weights(flags.weights),
      ema=flags.ema,
    )  # fmt: skip
  except (ConfigError, CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"wrote {path}")
  return 0


def _steps(flags) -> list[int]:
  if flags.steps:
    return _numbers(flags.steps, int, "--steps")
  if flags.best is not None:
    return best_steps(flags.source, flags.best, flags.metric)
  last = flags.last if flags.last is not None else 1 if flags.ema else 5
  saved = saved_steps(flags.source)
  if not 1 <= last <= len(saved):
    raise ConfigError(f"{flags.source} has {len(saved)} checkpoints {saved}; {last} are asked for")
  return saved[-last:]


def _weights(text: str) -> str | list[float]:
  return text if text in WEIGHTS else _numbers(text, float, "--weights")


def _numbers(text: str, kind: type, name: str) -> list:
  try:
    return [kind(part) for part in text.split(",")]
  except ValueError:
    words = f"one of {', '.join(WEIGHTS)} or " if name == "--weights" else ""
    raise ConfigError(f"{name}={text}: expected {words}numbers with commas between") from None


if __name__ == "__main__":
  sys.exit(main())
