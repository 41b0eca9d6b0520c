"""How text is decoded: every choice of a sampler, as one value."""

from __future__ import annotations

import dataclasses
import math

from lladax.infer.caching import Cache, NoCache
from lladax.infer.credit import Credit
from lladax.infer.edits import Edit
from lladax.infer.eos import EosPolicy, KeepEos
from lladax.infer.smoothing import Smoothing
from lladax.infer.step_schedule import EqualShares, StepSchedule
from lladax.infer.unmasking import LowConfidence, Unmask


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How text is decoded.

  Attributes:
    gen_length: tokens to write after a prompt.
    steps: iterations over all blocks; LLaDA is best at steps = gen_length. Rules that count on
      confidence alone (`Threshold`, `Factor`, `Hierarchical`) need fewer and ignore it.
    block_length: blocks of this many tokens are written one after the other; gen_length for one.
    temperature: 0 for the most likely token, 1 for samples of the model's distribution.
    top_k: None, or only this many most likely tokens are drawn from.
    top_p: None, or only the fewest most likely tokens that together have this probability.
    unmask: which positions are written in an iteration.
    step_schedule: how many positions an iteration is asked to write.
    cfg_scale: classifier-free guidance; 0 for none, else every iteration costs two passes.
    eos: what becomes of EOS.
    early_stop: whether a row ends with the block in which it writes EOS; what follows is EOS.
    min_length: EOS is not written among this many first tokens.
    suppress: ids that are never written.
    cache: what is kept from one pass to the next.
    smoothing: None, or masked positions are fed the mean embedding of what was predicted there.
    credit: None, or predictions that keep coming back gain confidence.
    edit: None, or what becomes of tokens that were written.
    align_blocks: whether blocks are counted from the start of the row and not from the end of the
      prompt, as block-causal networks need and dInfer does by default.

  Raises:
    ValueError: for numbers out of range, a block length that does not divide gen_length, or steps
      that do not divide by the number of blocks.
  """

  gen_length: int = 128
  steps: int = 128
  block_length: int = 32
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  unmask: Unmask = LowConfidence()
  step_schedule: StepSchedule = EqualShares()
  cfg_scale: float = 0.0
  eos: EosPolicy = KeepEos()
  early_stop: bool = False
  min_length: int = 0
  suppress: tuple[int, ...] = ()
  cache: Cache = NoCache()
  smoothing: Smoothing | None = None
  credit: Credit | None = None
  edit: Edit | None = None
  align_blocks: bool = False

  def __post_init__(self):
    for name in ("gen_length", "steps", "block_length"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is at least 1; got {getattr(self, name)}")
    for name in ("temperature", "cfg_scale"):
      value = getattr(self, name)
      if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is a finite number of at least 0; got {value}")
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f"top_k is at least 1, or None for all tokens; got {self.top_k}")
    if self.top_p is not None and not 0 <= self.top_p <= 1:
      raise ValueError(f"top_p lies in [0, 1], or is None for all tokens; got {self.top_p}")
    if not 0 <= self.min_length <= self.gen_length:
      raise ValueError(
        f"min_length lies between 0 and gen_length {self.gen_length}; got {self.min_length}"
      )
    if any(token < 0 for token in self.suppress):
      raise ValueError(f"suppress holds ids, which count from 0; got {self.suppress}")
    if self.gen_length % self.block_length:
      raise ValueError(
        f"gen_length {self.gen_length} is not a multiple of block_length {self.block_length}; "
        f"use a divisor of {self.gen_length}, or {self.gen_length} itself for one block"
      )
    if self.steps % self.num_blocks:
      raise ValueError(
        f"steps {self.steps} do not divide by the {self.num_blocks} blocks of {self.block_length} "
        f"in {self.gen_length} tokens; use a multiple of {self.num_blocks}"
      )
    if self.smoothing is not None and self.cfg_scale:
      raise ValueError(
        "smoothing feeds one row's predictions back; set cfg_scale=0 or no smoothing"
      )

  @property
  def drawing(self) -> dict[str, float | None]:
    """`temperature` and `top_p` as far as they matter: data of each row, see `State`."""
    drawn = self.temperature > 0
    limited = drawn and self.top_p is not None and self.top_p < 1
    return {
      "temperature": self.temperature if drawn else None,
      "top_p": self.top_p if limited else None,
    }

  @property
  def program(self) -> SamplerConfig:
    """What is compiled: the same for all that differ in numbers of `drawing` only."""
    drawing = self.drawing
    return dataclasses.replace(
      self,
      temperature=0.0 if drawing["temperature"] is None else 1.0,
      top_p=None if drawing["top_p"] is None else 0.5,
    )

  @property
  def num_blocks(self) -> int:
    return self.gen_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    return self.steps // self.num_blocks
