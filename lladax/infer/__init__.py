"""Decoding: canvas, rules, caches, the loop, generation, infilling, an engine and a viewer."""

from lladax.infer.caching import BlockCausal, Cache, DualCache, NoCache, PrefixCache, Vicinity
from lladax.infer.canvas import Canvas
from lladax.infer.config import SamplerConfig
from lladax.infer.credit import Credit
from lladax.infer.edits import Edit, EditTokens, RemaskLow
from lladax.infer.engine import Engine, Request, Update
from lladax.infer.eos import EosPolicy, KeepEos, LowEosConfidence, NoEosLogits
from lladax.infer.generate import GenerateResult, generate, infill
from lladax.infer.network import DenoiseFn, Network
from lladax.infer.published import PUBLISHED
from lladax.infer.smoothing import Smoothing
from lladax.infer.step_schedule import EqualShares, LinearTime, StepSchedule
from lladax.infer.unmasking import (
  Entropy,
  Factor,
  Hierarchical,
  LowConfidence,
  Margin,
  Origin,
  Random,
  Threshold,
  ThresholdOrBudget,
  Unmask,
)

__all__ = [
  "PUBLISHED",
  "BlockCausal",
  "Cache",
  "Canvas",
  "Credit",
  "DenoiseFn",
  "DualCache",
  "Edit",
  "EditTokens",
  "Engine",
  "Entropy",
  "EosPolicy",
  "EqualShares",
  "Factor",
  "GenerateResult",
  "Hierarchical",
  "KeepEos",
  "LinearTime",
  "LowConfidence",
  "LowEosConfidence",
  "Margin",
  "Network",
  "NoCache",
  "NoEosLogits",
  "Origin",
  "PrefixCache",
  "Random",
  "RemaskLow",
  "Request",
  "SamplerConfig",
  "Smoothing",
  "StepSchedule",
  "Threshold",
  "ThresholdOrBudget",
  "Unmask",
  "Update",
  "Vicinity",
  "generate",
  "infill",
]
