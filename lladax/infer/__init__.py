"""Decoding: canvas, unmasking rules, the sampler loop, generation, infilling and a viewer."""

from lladax.infer.canvas import Canvas
from lladax.infer.credit import Credit
from lladax.infer.denoiser import DenoiseFn, EosPolicy, KeepEos, LowEosConfidence, NoEosLogits
from lladax.infer.edits import Edit, EditTokens, RemaskLow
from lladax.infer.generate import GenerateResult, generate, infill
from lladax.infer.sampler import SamplerConfig
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
  "Canvas",
  "Credit",
  "DenoiseFn",
  "Edit",
  "EditTokens",
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
  "NoEosLogits",
  "Origin",
  "Random",
  "RemaskLow",
  "SamplerConfig",
  "StepSchedule",
  "Threshold",
  "ThresholdOrBudget",
  "Unmask",
  "generate",
  "infill",
]
