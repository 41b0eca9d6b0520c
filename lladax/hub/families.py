"""The families of released models, and which of them a folder or a model belongs to."""

from __future__ import annotations

from lladax.hub.family import Config, Family
from lladax.hub.llada import LLADA
from lladax.hub.llada2 import LLADA2
from lladax.hub.llada_moe import LLADA_MOE
from lladax.hub.qwen2 import DREAM, QWEN2
from lladax.models import ModelConfig

FAMILIES: tuple[Family, ...] = (LLADA_MOE, LLADA, LLADA2, DREAM, QWEN2)


def family_of(config: Config) -> Family:
  """The family of a config.json.

  Raises:
    ValueError: if there is none, or if `model_type` contradicts `architectures`.
  """
  architectures, model_type = config.get("architectures"), config.get("model_type")
  said = f"config.json has architectures {architectures!r} and model_type {model_type!r}"
  found = [family for family in FAMILIES if family.matches(config)]
  if not found:
    known = "; ".join(
      f"{family.name}: {family.architectures[0]} (model_type {family.model_types[0]!r})"
      for family in FAMILIES
    )
    raise ValueError(f"{said}, which is no architecture that lladax knows. Known are {known}")
  family = found[0]
  if model_type is not None and model_type not in family.model_types:
    raise ValueError(
      f"{said}, which contradict each other: {family.architectures[0]} goes with model_type "
      f"{' or '.join(map(repr, family.model_types))}. Correct the one that is wrong"
    )
  if family.marker not in config:
    raise ValueError(
      f"{said}, but no {family.marker}, which every {family.name} model has: it is not what it says"
    )
  return family


def family_for(model: ModelConfig) -> Family:
  """The family that a model can be exported as.

  Raises:
    ValueError: if there is none, with the field that each of them lacks.
  """
  lacking = {}
  for family in FAMILIES:
    misfit = family.misfit(model)
    if misfit is None:
      return family
    lacking[family.name] = misfit
  reasons = "; ".join(f"{name} has no {misfit}" for name, misfit in lacking.items())
  raise ValueError(f"no released family has a model like this one: {reasons}")


__all__ = ["FAMILIES", "Family", "family_for", "family_of"]
