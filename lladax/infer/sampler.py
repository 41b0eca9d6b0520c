"""Semi-autoregressive decoding, LLaDA's own (arXiv 2502.09992): block after block, each a loop.

All blocks run inside one `jit`, with no word to the host in between. A block is given its steps;
iteration i draws a token for every masked position of the block, writes those that the unmasking
rule chooses and leaves the others masked.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import struct

from lladax.infer.canvas import Canvas, window
from lladax.infer.denoiser import (
  DenoiseFn,
  EosPolicy,
  KeepEos,
  draw_tokens,
  guided_logits,
  token_probability,
)
from lladax.infer.unmasking import LowConfidence, Unmask
from lladax.types import BoolPerToken, PerToken, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
  """How text is decoded.

  Attributes:
    gen_length: tokens to write after a prompt.
    steps: iterations over all blocks; LLaDA is best at steps = gen_length.
    block_length: blocks of this many tokens are written one after the other; gen_length for one.
    temperature: 0 for the most likely token, 1 for samples of the model's distribution.
    unmask: which positions are written in an iteration.
    cfg_scale: classifier-free guidance; 0 for none, else every iteration costs two passes.
    eos: what becomes of EOS.

  Raises:
    ValueError: for numbers out of range, a block length that does not divide gen_length, or steps
      that do not divide by the number of blocks.
  """

  gen_length: int = 128
  steps: int = 128
  block_length: int = 32
  temperature: float = 0.0
  unmask: Unmask = LowConfidence()
  cfg_scale: float = 0.0
  eos: EosPolicy = KeepEos()

  def __post_init__(self):
    for name in ("gen_length", "steps", "block_length"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is at least 1; got {getattr(self, name)}")
    for name in ("temperature", "cfg_scale"):
      value = getattr(self, name)
      if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is a finite number of at least 0; got {value}")
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

  @property
  def num_blocks(self) -> int:
    return self.gen_length // self.block_length

  @property
  def steps_per_block(self) -> int:
    return self.steps // self.num_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """Which columns are decoded: `count` blocks of `width` from column `first`, `steps` each."""

  first: int
  width: int
  count: int
  steps: int


@struct.dataclass
class Progress:
  """A canvas on its way, and how it came about.

  Attributes:
    tokens: int32[B, L].
    revealed_at: int32[B, L]. In which iteration of its row, from 0, a token was written; -1 for
      what was given, for padding and for what is still masked. Tokens are written once, so this is
      the whole trajectory.
    confidence: float32[B, L]. With which confidence it was written; 0 where nothing was.
    iterations: int32[B]. Iterations in which the row had something to write. Those that its
      neighbours needed are not counted, so the number does not depend on them.
  """

  tokens: Tokens
  revealed_at: jax.Array
  confidence: PerToken
  iterations: jax.Array


@functools.partial(jax.jit, static_argnames=("denoise", "config", "blocks", "mask_id", "eos_ids"))
def decode(
  denoise: DenoiseFn,
  params: object,
  canvas: Canvas,
  keys: jax.Array,
  *,
  config: SamplerConfig,
  blocks: Blocks,
  mask_id: int,
  eos_ids: tuple[int, ...],
) -> Progress:
  """Writes every MASK within `blocks`, from left to right.

  Args:
    denoise, params: the network, see `DenoiseFn`.
    canvas: [B, L].
    keys: [B], one per row; a row's result is a function of its key and its own tokens.
    config: unmasking rule, temperature, guidance and EOS policy; its lengths are in `blocks`.
    mask_id, eos_ids: special ids.
  """
  given = (canvas.tokens != mask_id) & (canvas.segment_ids != 0)
  shape = canvas.tokens.shape
  start = Progress(
    tokens=jnp.asarray(canvas.tokens),
    revealed_at=jnp.full(shape, -1, jnp.int32),
    confidence=jnp.zeros(shape, jnp.float32),
    iterations=jnp.zeros(shape[0], jnp.int32),
  )

  def one_block(index, progress):
    column = blocks.first + index * blocks.width
    positions = window(canvas.positions, column, blocks.width)

    def draw(tokens, draw_keys):
      noisy = canvas.replace(tokens=tokens)
      logits = guided_logits(
        denoise,
        params,
        noisy,
        given,
        column,
        blocks.width,
        cfg_scale=config.cfg_scale,
        mask_id=mask_id,
      )
      logits = config.eos.logits(logits, eos_ids)
      drawn = draw_tokens(logits, draw_keys, positions, temperature=config.temperature)
      confidence = token_probability(logits, drawn)
      return drawn, config.eos.confidence(confidence, drawn, eos_ids)

    return denoise_block(
      draw,
      progress,
      column,
      fold_in_rows(keys, index),
      unmask=config.unmask,
      width=blocks.width,
      steps=blocks.steps,
      mask_id=mask_id,
    )

  return jax.lax.fori_loop(0, blocks.count, one_block, start)


def denoise_block(
  draw, progress: Progress, column, keys, *, unmask: Unmask, width: int, steps: int, mask_id: int
) -> Progress:
  """Iterates until no MASK is left in columns [column, column + width).

  Args:
    draw: (tokens [B, L], keys [B]) -> (tokens [B, W], confidence [B, W]).
    column: int32[], may be traced.
    keys: [B], of the row and the block.
    steps: the iterations over which each row's masks are spread.
  """
  at_start = count_masked(window(progress.tokens, column, width) == mask_id)

  def unfinished(state):
    iteration, progress = state
    # A rule that keeps its contract is done within max(steps, width) iterations. The bound is for
    # one that does not: an endless loop on a device cannot be interrupted.
    masked = window(progress.tokens, column, width) == mask_id
    return jnp.any(masked) & (iteration < max(steps, width))

  def iterate(state):
    iteration, progress = state
    draw_keys, unmask_keys = split_rows(fold_in_rows(keys, iteration))
    masked = window(progress.tokens, column, width) == mask_id
    drawn, confidence = draw(progress.tokens, draw_keys)
    left = count_masked(masked)
    budget = reveal_budget(at_start, left, iteration, steps)
    commit = unmask(confidence, masked, budget, unmask_keys) & masked
    return iteration + 1, write(progress, column, commit, drawn, confidence, active=left > 0)

  return jax.lax.while_loop(unfinished, iterate, (jnp.int32(0), progress))[1]


def reveal_budget(at_start, left, iteration, steps):
  """How many to write: masks // steps, the remainder going to the first iterations. int32[B].

  From the last step on it is all that is left, which is the same number for a rule that has kept
  to its budget so far.
  """
  share = at_start // steps + (iteration < at_start % steps)
  return jnp.where(iteration >= steps - 1, left, jnp.minimum(share, left))


def write(progress: Progress, column, commit, drawn, confidence, *, active) -> Progress:
  """Puts the committed tokens [B, W] into the canvas at `column` and counts the iteration."""

  def put(whole, new):
    old = window(whole, column, commit.shape[1])
    return jax.lax.dynamic_update_slice_in_dim(whole, jnp.where(commit, new, old), column, axis=1)

  return Progress(
    tokens=put(progress.tokens, drawn),
    revealed_at=put(progress.revealed_at, progress.iterations[:, None]),
    confidence=put(progress.confidence, confidence),
    iterations=progress.iterations + active,
  )


def count_masked(masked: BoolPerToken) -> jax.Array:
  return jnp.sum(masked, axis=1, dtype=jnp.int32)


def fold_in_rows(keys: jax.Array, data) -> jax.Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def split_rows(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  pairs = jax.vmap(jax.random.split)(keys)  # [B, 2]
  return pairs[:, 0], pairs[:, 1]
