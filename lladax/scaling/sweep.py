"""Compiling one experiment on many meshes and exchanges, and naming the best."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator

from lladax import moe
from lladax.config import ConfigError
from lladax.experiment import Experiment
from lladax.scaling import aot, mesh_rule
from lladax.scaling.chips import Slice
from lladax.scaling.plan import Plan, fit_microbatches, plan_training
from lladax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
  """A candidate and what became of it: a plan, or why there is none."""

  config: Experiment
  plan: Plan | None
  refused: str = ""


def candidates(config: Experiment, slice_: Slice) -> Iterator[Experiment]:
  """Every exchange on every mesh that fits the torus, the most promising by `mesh_rule` first."""
  tokens = config.data.batch_size * config.data.length / config.microbatches / slice_.devices
  for choice in mesh_rule.choices(config.model, slice_, config.data.length, tokens):
    if not choice.excluded:
      yield with_choice(config, choice.exchange, choice.mesh)


def with_choice(config: Experiment, exchange: str, mesh: dict[str, int]) -> Experiment:
  """The experiment on another mesh, with another exchange.

  Raises:
    ConfigError: for an exchange that there is not.
  """
  model = config.model
  if model.moe is not None and exchange:
    model = dataclasses.replace(
      model, moe=dataclasses.replace(model.moe, exchange=exchange_named(exchange))
    )
  return dataclasses.replace(config, model=model, mesh=MeshConfig(**mesh))


def exchange_named(name: str):
  """The exchange of a name: "Ring" is `Ring()`."""
  known = exchanges()
  if name not in known:
    raise ConfigError(f"there is no exchange {name!r}; one of {', '.join(sorted(known))}")
  return known[name]()


def exchanges(parent: type = moe.Exchange) -> dict[str, type]:
  """Every exchange by its name."""
  found = {} if inspect.isabstract(parent) else {parent.__name__: parent}
  for child in parent.__subclasses__():
    found |= exchanges(child)
  return found


def sweep(
  config: Experiment,
  slice_: Slice,
  *,
  limit: int | None = None,
  fit: bool = False,
  report: Callable[[str], None] = lambda text: None,
) -> list[Tried]:
  """Compiles the candidates one after the other; the fastest that fits comes first."""
  aot.devices(slice_)  # what is wrong with libtpu is wrong with all of them
  tried, chosen = [], list(itertools.islice(candidates(config, slice_), limit))
  for number, candidate in enumerate(chosen):
    mesh = ",".join(f"{axis}={n}" for axis, n in zip(
      ("fsdp", "expert"), (candidate.mesh.fsdp, candidate.mesh.expert), strict=True))  # fmt: skip
    exchange = type(candidate.model.moe.exchange).__name__ if candidate.model.moe else "-"
    report(f"{number + 1} of {len(chosen)}: {mesh} {exchange}")
    try:
      if fit:
        candidate, plan = fit_microbatches(candidate, slice_, report)
      else:
        plan = plan_training(candidate, slice_)
      tried.append(Tried(config=candidate, plan=plan))
    except ConfigError as error:
      report(f"  refused: {error}")
      tried.append(Tried(config=candidate, plan=None, refused=str(error)))
  return sorted(tried, key=_order)


def _order(tried: Tried):
  if tried.plan is None:
    return (2, 0.0)
  if tried.plan.roofline is None or not tried.plan.memory.fits:
    return (1, tried.plan.memory.needed)
  roof = tried.plan.roofline
  return (0, (roof.overlapped + roof.serial) / 2)
