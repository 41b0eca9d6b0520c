"""Decoding: canvas, unmasking rules, the sampler loop, generation, infilling and a viewer."""

from lladax.infer.canvas import Canvas
from lladax.infer.denoiser import DenoiseFn, EosPolicy, KeepEos, LowEosConfidence, NoEosLogits
from lladax.infer.generate import GenerateResult, generate, infill
from lladax.infer.sampler import SamplerConfig
from lladax.infer.unmasking import LowConfidence, Random, Unmask

__all__ = [
  "Canvas",
  "DenoiseFn",
  "EosPolicy",
  "GenerateResult",
  "KeepEos",
  "LowConfidence",
  "LowEosConfidence",
  "NoEosLogits",
  "Random",
  "SamplerConfig",
  "Unmask",
  "generate",
  "infill",
]
