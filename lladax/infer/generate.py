"""Generation from prompts, and infilling: lists of ids in, lists of ids out.

The host's side of decoding: checks, the canvas, one jitted call per block, the result as numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lladax.infer.caching import BlockCausal
from lladax.infer.canvas import Canvas, masked_canvas, prompt_canvas
from lladax.infer.config import SamplerConfig
from lladax.infer.earlier import Earlier, earlier_tokens
from lladax.infer.iteration import Ids
from lladax.infer.network import DenoiseFn, Network, as_network
from lladax.infer.sampler import decode_block, window_rest
from lladax.infer.state import State, start_state

# The ids written so far by a row, up to the end of a block -> whether it has written enough.
Stop = Callable[[list[int]], bool]


@dataclasses.dataclass(frozen=True, eq=False)
class Trail:
  """What a block went through, where tokens may be written more than once.

  Attributes:
    column: int32[B], where the block of each row begins.
    iterations: int32[B], how many the row needed for it.
    tokens: int32[iterations, B, W], after each of them.
    confidence: float32[iterations, B, W], with which they were written.
  """

  column: np.ndarray
  iterations: np.ndarray
  tokens: np.ndarray
  confidence: np.ndarray


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
    trail: where written tokens may change, what each block went through; empty otherwise.
  """

  tokens: np.ndarray
  is_text: np.ndarray
  revealed_at: np.ndarray
  confidence: np.ndarray
  nfe: np.ndarray
  answers: list[list[int]]
  mask_id: int
  trail: tuple[Trail, ...] = ()

  def row(self, index: int) -> list[int]:
    """The canvas of a row without padding, nothing cut."""
    return self.tokens[index][self.is_text[index]].tolist()

  def frames(self, index: int) -> np.ndarray:
    """The trajectory of a row: int32[iterations + 1, length], from its first canvas to its last.

    Frame k shows what was there before iteration k, with MASK where nothing was written yet.
    """
    keep = self.is_text[index]
    if self.trail:
      return self._replay(index)[:, keep]
    tokens, when = self.tokens[index][keep], self.revealed_at[index][keep]
    frame = np.arange(when.max(initial=-1) + 2)[:, None]
    return np.where(when < frame, tokens, self.mask_id)

  def earlier(self, index: int) -> list[Earlier]:
    """What a row's tokens read before, by iteration; places are columns of `frames`."""
    first, found = 0, []
    place = np.cumsum(self.is_text[index]) - 1
    for block in self.trail:
      column, count = block.column[index], block.iterations[index]
      when = self.revealed_at[index, column : column + block.tokens.shape[2]]
      tokens, sure = (x[:count, index, : len(when)] for x in (block.tokens, block.confidence))
      for one in earlier_tokens(tokens, sure, when, first=first, mask_id=self.mask_id):
        found.append(dataclasses.replace(one, place=int(place[column + one.place])))
      first += count
    return found

  def _replay(self, index: int) -> np.ndarray:
    canvas = np.where(self.revealed_at[index] < 0, self.tokens[index], self.mask_id)
    frames = [canvas]
    for block in self.trail:
      column = block.column[index]
      for tokens in block.tokens[: block.iterations[index], index]:
        canvas = canvas.copy()
        room = min(len(tokens), len(canvas) - column)
        canvas[column : column + room] = tokens[:room]
        frames.append(canvas)
    if (frames[-1] != self.tokens[index]).any():  # what an early stop has filled
      frames[-1] = self.tokens[index]
    return np.stack(frames)


def generate(
  denoise: DenoiseFn | Network,
  params: object,
  prompts: Sequence[Sequence[int]],
  config: SamplerConfig,
  *,
  mask_id: int,
  eos_id: int | Sequence[int],
  pad_id: int,
  seeds: int | Sequence[int] = 0,
  gen_lengths: Sequence[int] | None = None,
  stop: Stop | None = None,
  max_length: int | None = None,
  prompt_multiple: int = 32,
) -> GenerateResult:
  """Writes `config.gen_length` tokens after each prompt.

  A row's answer is what it would be alone with its own seed, provided that `denoise` respects
  positions and segments.

  Args:
    denoise, params: the network, see `Network` and `DenoiseFn`. Calls with an equal `denoise` and
      `config` and canvases of equal shape share one compilation.
    prompts: ids, of any lengths; an empty one starts from nothing.
    mask_id, pad_id: special ids; padding is never read by the network.
    eos_id: the id or ids that end a text.
    seeds: one per row, or one number s for s, s + 1, ... Only read if something is drawn.
    gen_lengths: tokens to write after each prompt, where they differ.
    stop: asked after each block what is to be ended; the row keeps what it has.
    max_length: the context of the network, prompt and answer together; None for no check.
    prompt_multiple: canvases are padded to a multiple of this, to compile less often.

  Raises:
    ValueError: see `prompt_canvas`, `check_network` and `SamplerConfig`; a number of seeds or
      lengths that does not fit.
  """
  lengths = [config.gen_length] * len(prompts) if gen_lengths is None else list(gen_lengths)
  if len(lengths) != len(prompts) or any(length < 1 for length in lengths):
    raise ValueError(f"gen_lengths is one positive number for each of {len(prompts)} prompts; "
                     f"got {lengths}")  # fmt: skip
  canvas = prompt_canvas(
    prompts,
    lengths,
    mask_id=mask_id,
    pad_id=pad_id,
    block_length=config.block_length,
    align=config.align_blocks,
    max_length=max_length,
    multiple=prompt_multiple,
  )
  result = run(denoise, params, canvas, config, seeds, stop, mask_id=mask_id, eos_id=eos_id)
  answers = [
    cut_at_eos(result.row(r)[first:], as_ids(eos_id)) for r, first in enumerate(canvas.first)
  ]
  return dataclasses.replace(result, answers=answers)


def infill(
  denoise: DenoiseFn | Network,
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
    rows, mask_id=mask_id, pad_id=pad_id, max_length=max_length, block_length=block_length or 1
  )
  config = infill_config(config, block_length, canvas.tokens.shape[1])
  return run(denoise, params, canvas, config, seeds, None, mask_id=mask_id, eos_id=eos_id)


def infill_config(config: SamplerConfig, block_length: int | None, length: int) -> SamplerConfig:
  """The sampler for rows of `length` with masks anywhere; see `infill`."""
  blocks = config.num_blocks if block_length else 1
  width = block_length or length
  return dataclasses.replace(
    config, gen_length=width * blocks, block_length=width, min_length=0, early_stop=False
  )


def check_network(network: Network, config: SamplerConfig):
  """Whether a sampler and a network go together.

  Raises:
    ValueError: for a `BlockCausal` cache with blocks other than those of the network's attention,
      or not counted from the start of the row; for a cache or smoothing with a plain `DenoiseFn`.
  """
  if isinstance(config.cache, BlockCausal):
    length = getattr(network, "block_length", None)
    if length != config.block_length or not config.align_blocks:
      raise ValueError(
        "cache=BlockCausal() is for a network with block-causal attention of the same blocks: "
        f"give Denoiser(config, block_length={config.block_length}), which is {length} here, and "
        f"align_blocks=True, which is {config.align_blocks}"
      )
  if (config.cache.keeps or config.smoothing) and not hasattr(network, "read_window"):
    raise ValueError(
      f"{network!r} is a plain function of tokens: it keeps no keys and values and has no "
      "embeddings; use cache=NoCache() and smoothing=None, or a lladax.models.Denoiser"
    )


def run(
  denoise, params, canvas: Canvas, config, seeds, stop: Stop | None, *, mask_id: int, eos_id
) -> GenerateResult:
  """Decodes block by block. `answers` are the whole rows.

  Raises:
    RuntimeError: if the unmasking rule left something masked.
  """
  network = as_network(denoise)
  check_network(network, config)
  ids = Ids(mask=mask_id, eos=as_ids(eos_id))
  keys = row_keys(seeds, canvas.tokens.shape[0])
  kept = empty(network, canvas.tokens.shape, config)
  state = start_state(canvas, keys, mask_id=mask_id, **config.drawing, **kept)
  config = config.program
  trail: list[Trail] = []
  ends = np.asarray(canvas.end)
  columns = int(np.max(ends - canvas.column))
  for block in range(canvas.num_blocks(config.block_length)):
    rest = window_rest(config, columns - block * config.block_length)
    column, begun = jax.device_get((state.column, state.iterations)) if config.edit else (0, 0)
    state = decode_block(network, params, state, config=config, ids=ids, rest=rest)
    if config.edit:
      done, seen = jax.device_get((state.iterations, state.history))
      trail.append(Trail(column, done - begun, seen.tokens, seen.confidence))
      state = state.replace(history=None)
    if stop is not None:
      state = stop_rows(state, stop, ids)
    if (config.early_stop or stop is not None) and bool(jnp.all(state.column >= state.end)):
      break
  last = jax.device_get(state.replace(memory=None, soft=None, keys=None, history=None))
  return dataclasses.replace(collect(last, config, mask_id), trail=tuple(trail))


def empty(network: Network, shape: tuple[int, int], config: SamplerConfig) -> dict[str, Any]:
  """`State.memory` and `State.soft` of a canvas [B, S] before the first pass."""
  rows, length = shape
  times = 2 if config.cfg_scale else 1
  return {
    "memory": network.empty_memory(times * rows, length) if config.cache.keeps else None,
    "soft": network.empty_soft(rows, length) if config.smoothing else None,
  }


def stop_rows(state: State, stop: Stop, ids: Ids) -> State:
  """Ends the rows that have written enough."""
  tokens, first, column, end = jax.device_get((state.tokens, state.first, state.column, state.end))
  ends = end.copy()
  for row in range(len(tokens)):
    if column[row] < end[row]:
      answer = cut_at_eos(tokens[row, first[row] : column[row]].tolist(), ids.eos)
      if stop(answer):
        ends[row] = column[row]
  return state.replace(end=jnp.asarray(ends))


def collect(state: State, config: SamplerConfig, mask_id: int) -> GenerateResult:
  """The result of finished rows, on the host."""
  columns = np.arange(state.tokens.shape[1])
  left = (state.tokens == mask_id) & (columns < state.end[:, None])
  if left.any():
    raise RuntimeError(
      f"{config.unmask} left {int(left.sum())} positions masked; a rule writes at least one "
      "position per iteration while its budget is positive (see lladax.infer.unmasking.Unmask)"
    )
  result = GenerateResult(
    tokens=state.tokens,
    is_text=(state.segment_ids != 0) & (state.tokens != mask_id),
    revealed_at=state.revealed_at,
    confidence=state.confidence,
    nfe=state.nfe,
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
