"""Published ways to decode, by name: start from one and change what is to be changed.

`PUBLISHED["dinfer"](gen_length=256)` is a `SamplerConfig`; on the command line `--sampler=dinfer
--set gen_length=256`. What their authors do not say is left at LLaDA's own choice.
"""

from __future__ import annotations

from collections.abc import Callable

from lladax.infer.caching import BlockCausal, DualCache, PrefixCache, Vicinity
from lladax.infer.config import SamplerConfig
from lladax.infer.credit import Credit
from lladax.infer.edits import EditTokens
from lladax.infer.smoothing import Smoothing
from lladax.infer.step_schedule import LinearTime
from lladax.infer.unmasking import Entropy, Hierarchical, Threshold, ThresholdOrBudget


def llada(gen_length: int = 128, block_length: int | None = None) -> SamplerConfig:
  """LLaDA's own loop: one token per step, the whole canvas in every pass (arXiv 2502.09992)."""
  block = block_length or gen_length
  return SamplerConfig(gen_length=gen_length, steps=gen_length, block_length=block)


def fast_dllm(gen_length: int = 256, block_length: int = 32) -> SamplerConfig:
  """Fast-dLLM: prefix cache, confidence 0.9 (arXiv 2505.22618)."""
  return _blocks(gen_length, block_length, cache=PrefixCache(), unmask=Threshold(0.9, slack=0.0))


def fast_dllm_dual(gen_length: int = 256, block_length: int = 32) -> SamplerConfig:
  """Fast-dLLM with its dual cache."""
  return _blocks(gen_length, block_length, cache=DualCache(), unmask=Threshold(0.9, slack=0.0))


def dinfer(gen_length: int = 1024, block_length: int = 64) -> SamplerConfig:
  """dInfer's for LLaDA-MoE: vicinity refresh, smoothing, confidence 0.8, early stop.

  arXiv 2510.08666: 681 tokens/s at 3.87 tokens per pass on 8 H800, batch 1, over six tasks.
  """
  return _blocks(
    gen_length,
    block_length,
    cache=Vicinity(before=16, after=16, warmup=4),
    smoothing=Smoothing(weight=0.3),
    unmask=Threshold(0.8, start=1.0, decay=0.02),
    early_stop=True,
    align_blocks=True,
  )


def dinfer_credit(gen_length: int = 1024, block_length: int = 64) -> SamplerConfig:
  """dInfer's without a cache: credit and smoothing."""
  return _blocks(
    gen_length,
    block_length,
    credit=Credit(),
    smoothing=Smoothing(weight=0.3),
    unmask=Threshold(0.8, start=1.0, decay=0.02),
    early_stop=True,
    align_blocks=True,
  )


def dinfer_distilled(gen_length: int = 1024, block_length: int = 64) -> SamplerConfig:
  """dInfer's for models distilled on trajectories (LLaDA-MoE-TD): hierarchical, as its guide has it."""
  return _blocks(
    gen_length,
    block_length,
    cache=Vicinity(before=16, after=16, warmup=4),
    smoothing=Smoothing(weight=0.3),
    unmask=Hierarchical(0.8, 0.5, start=1.0, decay=0.02),
    early_stop=True,
    align_blocks=True,
  )


def dream(gen_length: int = 256) -> SamplerConfig:
  """Dream-7B-Instruct: lowest entropy, one block, temperature 0.1, top-p 0.9 (arXiv 2508.15487)."""
  return SamplerConfig(
    gen_length=gen_length, steps=gen_length, block_length=gen_length, unmask=Entropy(),
    step_schedule=LinearTime(), temperature=0.1, top_p=0.9,
  )  # fmt: skip


def llada2(gen_length: int = 256) -> SamplerConfig:
  """LLaDA2.0: blocks of 32, exact cache, confidence 0.95 (arXiv 2512.15745)."""
  return _blocks(
    gen_length, 32, cache=BlockCausal(), unmask=ThresholdOrBudget(0.95), early_stop=True,
    align_blocks=True,
  )  # fmt: skip


def llada2_1(gen_length: int = 256) -> SamplerConfig:
  """LLaDA2.1: as LLaDA2.0, and what was written may be replaced (arXiv 2602.08676)."""
  return _blocks(
    gen_length, 32, cache=BlockCausal(), unmask=ThresholdOrBudget(0.95), edit=EditTokens(0.9, 16),
    early_stop=True, align_blocks=True,
  )  # fmt: skip


def _blocks(gen_length: int, block_length: int, **options) -> SamplerConfig:
  block_length = min(block_length, gen_length)
  return SamplerConfig(
    gen_length=gen_length, steps=gen_length, block_length=block_length, **options
  )


PUBLISHED: dict[str, Callable[..., SamplerConfig]] = {
  function.__name__: function
  for function in (
    llada, fast_dllm, fast_dllm_dual, dinfer, dinfer_credit, dinfer_distilled, dream, llada2,
    llada2_1,
  )
}  # fmt: skip
