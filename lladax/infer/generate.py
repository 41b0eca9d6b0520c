"""Generation from prompts, and infilling: lists of ids in, lists of ids out.

The host's side of decoding: checks, the canvas, one jitted call, and the result as numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from lladax.infer.canvas import Canvas, masked_canvas, prompt_canvas
from lladax.infer.denoiser import DenoiseFn
from lladax.infer.sampler import Blocks, SamplerConfig, decode


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateResult:
  """What was written, and when.

  Attributes:
    tokens: int32[B, L], the whole canvas with its padding.
    is_text: bool[B, L], False on padding.
    revealed_at: int32[B, L], the iteration of its row in which a token was written, from 0; -1
      where it was given.
    confidence: float32[B, L], with which it was written; 0 where it was given.
    nfe: int32[B], network passes that the row needed; two per iteration with guidance.
    answers: per row, what was written after the prompt, up to but without the first EOS; for
      `infill` the whole row as it is.
    mask_id: the id that stands for MASK in `frames`.
  """

  tokens: np.ndarray
  is_text: np.ndarray
  revealed_at: np.ndarray
  confidence: np.ndarray
  nfe: np.ndarray
  answers: list[list[int]]
  mask_id: int

  def row(self, index: int) -> list[int]:
    """The canvas of a row without padding, nothing cut."""
    return self.tokens[index][self.is_text[index]].tolist()

  def frames(self, index: int) -> np.ndarray:
    """The trajectory of a row: int32[iterations + 1, length], from its first canvas to its last.

    Frame k shows what was there before iteration k, with MASK where nothing was written yet.
    """
    keep = self.is_text[index]
    tokens, when = self.tokens[index][keep], self.revealed_at[index][keep]
    frame = np.arange(when.max(initial=-1) + 2)[:, None]
    return np.where(when < frame, tokens, self.mask_id)


def generate(
  denoise: DenoiseFn,
  params: object,
  prompts: Sequence[Sequence[int]],
  config: SamplerConfig,
  *,
  mask_id: int,
  eos_id: int | Sequence[int],
  pad_id: int,
  seeds: int | Sequence[int] = 0,
  max_length: int | None = None,
  prompt_multiple: int = 32,
) -> GenerateResult:
  """Writes `config.gen_length` tokens after each prompt.

  A row's answer is what it would be alone with its own seed, provided that `denoise` respects
  positions and segments.

  Args:
    denoise, params: the network, see `DenoiseFn`. Calls with an equal `denoise` and `config` and
      canvases of equal shape share one compilation.
    prompts: ids, of any lengths; an empty one starts from nothing.
    mask_id, pad_id: special ids; padding is never read by the network.
    eos_id: the id or ids that end a text.
    seeds: one per row, or one number s for s, s + 1, ... Only read if something is drawn.
    max_length: the context of the network, prompt and answer together; None for no check.
    prompt_multiple: prompts are padded to a multiple of this, to compile less often.

  Raises:
    ValueError: see `prompt_canvas` and `SamplerConfig`; a number of seeds that does not fit.
  """
  canvas = prompt_canvas(
    prompts,
    config.gen_length,
    mask_id=mask_id,
    pad_id=pad_id,
    max_length=max_length,
    multiple=prompt_multiple,
  )
  first = canvas.tokens.shape[1] - config.gen_length
  blocks = Blocks(
    first=first, width=config.block_length, count=config.num_blocks, steps=config.steps_per_block
  )
  result = run(denoise, params, canvas, config, blocks, seeds, mask_id=mask_id, eos_id=eos_id)
  answers = [cut_at_eos(row[first:].tolist(), as_ids(eos_id)) for row in result.tokens]
  return dataclasses.replace(result, answers=answers)


def infill(
  denoise: DenoiseFn,
  params: object,
  rows: Sequence[Sequence[int]],
  config: SamplerConfig,
  *,
  mask_id: int,
  eos_id: int | Sequence[int],
  pad_id: int,
  seeds: int | Sequence[int] = 0,
  max_length: int | None = None,
  block_length: int | None = None,
) -> GenerateResult:
  """Writes every MASK in the rows and leaves everything else as it is.

  Args:
    rows: ids with `mask_id` wherever something is to be written, of any lengths.
    config: as for `generate`, but for `gen_length`: the canvas is the rows themselves.
    block_length: None to take the row as one block of `config.steps` iterations; else blocks of
      this length from the left, each of `config.steps_per_block` iterations.
    The rest as for `generate`.

  Raises:
    ValueError: see `masked_canvas`; a `block_length` below 1; a number of seeds that does not fit.
  """
  if block_length is not None and block_length < 1:
    raise ValueError(f"block_length is at least 1, or None for one block; got {block_length}")
  canvas = masked_canvas(
    rows, mask_id=mask_id, pad_id=pad_id, max_length=max_length, block_length=block_length
  )
  length = canvas.tokens.shape[1]
  width = block_length or length
  blocks = Blocks(
    first=0,
    width=width,
    count=length // width,
    steps=config.steps_per_block if block_length else config.steps,
  )
  return run(denoise, params, canvas, config, blocks, seeds, mask_id=mask_id, eos_id=eos_id)


def run(
  denoise, params, canvas: Canvas, config, blocks: Blocks, seeds, *, mask_id: int, eos_id
) -> GenerateResult:
  """One jitted decode. `answers` are the whole rows.

  Raises:
    RuntimeError: if the unmasking rule left something masked.
  """
  keys = row_keys(seeds, canvas.tokens.shape[0])
  progress = jax.device_get(
    decode(
      denoise,
      params,
      canvas,
      keys,
      config=config,
      blocks=blocks,
      mask_id=mask_id,
      eos_ids=as_ids(eos_id),
    )
  )
  left = int(np.sum(progress.tokens == mask_id))
  if left:
    raise RuntimeError(
      f"{config.unmask} left {left} positions masked; a rule writes at least one position per "
      "iteration while its budget is positive (see lladax.infer.unmasking.Unmask)"
    )
  result = GenerateResult(
    tokens=progress.tokens,
    is_text=np.asarray(canvas.segment_ids) != 0,
    revealed_at=progress.revealed_at,
    confidence=progress.confidence,
    nfe=progress.iterations * (2 if config.cfg_scale else 1),
    answers=[],
    mask_id=mask_id,
  )
  return dataclasses.replace(result, answers=[result.row(r) for r in range(len(result.tokens))])


def row_keys(seeds: int | Sequence[int], rows: int) -> jax.Array:
  """Keys [B]: row r of one number s gets the key of s + r."""
  if isinstance(seeds, int | np.integer):
    seeds = [int(seeds) + row for row in range(rows)]
  if len(seeds) != rows:
    raise ValueError(f"there are {rows} rows and {len(seeds)} seeds; give one per row, or a number")
  return jax.vmap(jax.random.key)(np.asarray([seed % 2**32 for seed in seeds], np.uint32))


def cut_at_eos(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
  """Up to but without the first EOS; all of it if there is none."""
  ends = [index for index, token in enumerate(tokens) if token in eos_ids]
  return tokens[: ends[0]] if ends else tokens


def as_ids(eos_id: int | Sequence[int]) -> tuple[int, ...]:
  return (int(eos_id),) if isinstance(eos_id, int | np.integer) else tuple(map(int, eos_id))
