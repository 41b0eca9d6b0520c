"""One iteration of the decoding loop: read, draw, choose, write."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lladax.infer.config import SamplerConfig
from lladax.infer.drawing import (
  draw_tokens,
  is_any,
  remove_ids,
  remove_ids_before,
  token_probability,
)
from lladax.infer.network import Network
from lladax.infer.state import History, State
from lladax.models.cache import put_columns, select_rows, take_columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
  """Special ids of a model."""

  mask: int
  eos: tuple[int, ...]


@struct.dataclass
class Block:
  """Rows within a block.

  Attributes:
    state: the rows.
    iteration: int32[], in the block, from 0.
    at_start: int32[B], masks that the block began with.
    changed: bool[B], whether the last iteration changed tokens that were written before it.
    extra: int32[B], iterations since no mask was left.
    credit: what `Credit` keeps; None without.
  """

  state: State
  iteration: jax.Array
  at_start: jax.Array
  changed: jax.Array
  extra: jax.Array
  credit: Any


@dataclasses.dataclass(frozen=True)
class Step:
  """What all iterations of a block share.

  Attributes:
    network, params: see `Network`.
    config: how tokens are drawn and written.
    ids: of the model.
    rest: at least the columns from any row's block to its end.
    positions: of the rows, prepared by the network.
  """

  network: Network
  params: object
  config: SamplerConfig
  ids: Ids
  rest: int
  positions: Any

  @property
  def width(self) -> int:
    return self.config.block_length

  @property
  def bound(self) -> int:
    """Iterations after which a rule that keeps its contract is done, on every row."""
    edit = self.config.edit
    return max(self.config.steps_per_block, self.width) + (edit.extra_steps if edit else 0)

  def begin(self, state: State) -> Block:
    config, rows = self.config, len(state.column)
    if config.edit is not None:
      shape = (self.bound, rows, self.width)
      history = History(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
      state = state.replace(history=history)
    at_start = jnp.sum(self.masked(state), axis=1, dtype=jnp.int32)
    credit = None
    if config.credit is not None:
      canvas = state.tokens, state.positions, state.segment_ids
      words = self.network.vocab_size(self.params, *canvas)
      credit = config.credit.init(rows, self.width, words)
    if config.smoothing is not None:  # of a row that begins, nothing has been predicted
      new = (state.iterations == 0)[:, None, None]
      state = state.replace(soft=jnp.where(new, 0, state.soft))
    return Block(
      state=state,
      iteration=jnp.int32(0),
      at_start=at_start,
      changed=at_start > 0,
      extra=jnp.zeros(rows, jnp.int32),
      credit=credit,
    )

  def masked(self, state: State) -> jax.Array:
    """bool[B, W], what is still to be written in the block of each row."""
    window = take_columns(state.tokens, state.column, self.width)
    return (window == self.ids.mask) & (state.column < state.end)[:, None]

  def active(self, block: Block) -> jax.Array:
    """bool[B], rows that have something to do."""
    left = jnp.any(self.masked(block.state), axis=1)
    if self.config.edit is None:
      return left
    return left | (block.changed & (block.extra < self.config.edit.extra_steps))

  def reading(self, block: Block) -> jax.Array:
    """bool[B], rows that the network is to read: active ones, and those behind whose block another
    follows although there is nothing to write in it, where finished blocks are settled."""
    active = self.active(block)
    if not self.config.cache.settles:
      return active
    state = block.state
    between = (state.iterations > 0) & (state.column + self.width < state.end)
    return active | (between & (block.iteration == 0))

  def iterate(self, block: Block) -> Block:
    state, config = block.state, self.config
    masked, active = self.masked(state), self.active(block)
    keys = fold_in(fold_in(state.keys, state.block), jnp.full_like(state.block, block.iteration))
    draw_keys, unmask_keys = split(keys)
    reading = self.reading(block)
    logits, memory, soft = self.read(block, reading)
    credit = block.credit
    if config.credit is not None:
      logits, credit = config.credit(credit, logits, masked)
    logits = self._allowed(logits, state)
    columns = state.column[:, None] + jnp.arange(self.width)
    drawn = draw_tokens(
      logits, draw_keys, columns, temperature=state.temperature, top_k=config.top_k,
      top_p=state.top_p,
    )  # fmt: skip
    # Rules rank by a score of their own; what is recorded and what edits go by is a probability.
    confidence = token_probability(logits, drawn)
    score = config.eos.confidence(config.unmask.score(logits, drawn), drawn, self.ids.eos)
    left = jnp.sum(masked, axis=1, dtype=jnp.int32)
    budget = config.step_schedule(block.at_start, left, block.iteration, config.steps_per_block)
    commit = config.unmask(score, masked, budget, unmask_keys, state.iterations)
    commit = commit & masked & active[:, None]
    remask = jnp.zeros_like(commit)
    replace = remask
    if config.edit is not None:
      commit, replace, remask = self._edit(state, logits, drawn, confidence, masked, commit, active)
    passes = 2 if config.cfg_scale else 1
    state = state.replace(memory=memory, soft=soft, nfe=state.nfe + reading * passes)
    state = self._write(state, drawn, confidence, commit | replace, remask, active)
    if state.history is not None:
      now = (take_columns(x, state.column, self.width) for x in (state.tokens, state.confidence))
      history = jax.tree.map(
        lambda all_of_them, one: all_of_them.at[block.iteration].set(one),
        state.history, History(*now),
      )  # fmt: skip
      state = state.replace(history=history)
    if soft is not None:
      still = (state.tokens == self.ids.mask)[..., None]
      state = state.replace(soft=jnp.where(still, soft, 0))
    return block.replace(
      state=state,
      iteration=block.iteration + 1,
      changed=jnp.any(replace | remask, axis=1) | (left > 0),
      extra=block.extra + (active & (left == 0)),
      credit=credit,
    )

  def _allowed(self, logits: jax.Array, state: State) -> jax.Array:
    """Logits without MASK and what else is not to be written now."""
    config, eos = self.config, self.ids.eos
    logits = remove_ids(logits, (self.ids.mask, *config.suppress))
    if config.min_length:
      columns = state.column[:, None] + jnp.arange(self.width)
      logits = remove_ids_before(logits, eos, columns, state.first + config.min_length)
    return config.eos.logits(logits, eos)

  def _edit(self, state, logits, drawn, confidence, masked, commit, active):
    tokens, given, segments = (
      take_columns(x, state.column, self.width)
      for x in (state.tokens, state.given, state.segment_ids)
    )
    editable = ~given & ~masked & (segments != 0) & active[:, None]
    commit, replace, remask = self.config.edit(
      tokens=tokens,
      drawn=drawn,
      confidence=confidence,
      probability=jnp.where(masked, 0.0, token_probability(logits, tokens)),
      masked=masked,
      commit=commit,
      editable=editable,
    )
    return commit & masked & active[:, None], replace & editable, remask & editable

  def _write(self, state: State, drawn, confidence, written, remask, active) -> State:
    """Puts tokens, or MASK, into the canvas and counts the iteration."""

    def put(whole, new, blank):
      old = take_columns(whole, state.column, self.width)
      new = jnp.where(written, new, jnp.where(remask, blank, old))
      return put_columns(whole, new, state.column)

    return state.replace(
      tokens=put(state.tokens, drawn, self.ids.mask),
      revealed_at=put(state.revealed_at, state.iterations[:, None], -1),
      confidence=put(state.confidence, confidence, 0.0),
      iterations=state.iterations + active,
    )

  # --- Reading the network ---

  def read(self, block: Block, rows: jax.Array) -> tuple[jax.Array, Any, Any]:
    """Guided logits float32[B, W, V] of each row's block, and memory and `State.soft` afterwards.

    Args:
      rows: bool[B], those that are read. Of the others the logits mean nothing; their memory may be
        refreshed, but stays what it is for a cache that is not `uniform`.
    """
    state, cache = block.state, self.config.cache
    if not cache.keeps:
      logits, _, soft = self._whole(state, rows, keep=False)
      return self._guide(logits), None, soft
    whole = cache.whole(block.iteration, state.iterations)
    if cache.uniform and not cache.settles:
      logits, memory, soft = jax.lax.cond(
        jnp.any(whole),
        lambda: self._whole(state, rows, keep=True),
        lambda: self._window(state, rows),
      )
    else:
      logits, memory, soft = self._by_row(block, whole & rows, ~whole & rows)
    return self._guide(logits), memory, soft

  def _by_row(self, block: Block, whole: jax.Array, window: jax.Array):
    """Some rows read all, others their window. What one row needs changes nothing in the others."""
    state, settles = block.state, self.config.cache.settles

    def all_of_it():
      logits, memory, soft = self._whole(state, whole, keep=True)
      return logits, select_rows(self.twice(whole), memory, state.memory), soft

    def some_of_it(settle=False):
      return self._window(state, window, settle=settle)

    def mixed():
      logits, memory, soft = self._whole(state, whole, keep=True)
      some, kept, soft = self._window(state.replace(soft=soft), window, settle=settles)
      rows = self.twice(whole)
      return jnp.where(rows[:, None, None], logits, some), select_rows(rows, memory, kept), soft

    # Blocks are settled in the first iteration; so they are, for nothing, where some row reads the
    # whole in a later one, which `BlockCausal` never does.
    ways = (some_of_it, all_of_it, mixed)
    way = jnp.where(jnp.any(whole), jnp.where(jnp.any(window), 2, 1), 0)
    if settles:
      ways = (*ways, lambda: some_of_it(settle=True))
      way = jnp.where((way == 0) & (block.iteration == 0), 3, way)
    return jax.lax.switch(way, ways)

  def _whole(self, state: State, rows: jax.Array, *, keep: bool):
    none = jnp.zeros_like(state.column)
    at, width = (none, state.tokens.shape[1]) if self.wide else (state.column, self.width)
    logits, memory = self.network.read(
      self.params, *self._inputs(state), at=self.twice(at), width=width, soft=state.soft, keep=keep
    )
    return self._predicted(state, rows, logits, memory, at, at, at + width)

  def _window(self, state: State, rows: jax.Array, *, settle: bool = False):
    """`settle`: with the block before each row's."""
    length = state.tokens.shape[1]
    before, size = self.config.cache.window(self.width, self.rest)
    if settle:
      before, size = before + self.width, size + self.width
    behind = max(0, self.network.look_behind - before)
    before, size = before + behind, min(size + behind, length)
    first = state.column - before
    start = jnp.clip(first, 0, length - size)
    at, width, low, high = state.column, self.width, state.column, state.column + self.width
    if self.wide:  # the logits of the first columns may be those of columns before the window
      at, width, low, high = start, size, first + self.network.look_behind, first + size
    logits, memory = self.network.read_window(
      self.params, *self._inputs(state), at=self.twice(at), width=width, memory=state.memory,
      start=self.twice(start), size=size, refresh=(self.twice(first), self.twice(first + size)),
      rows=self.twice(rows), soft=state.soft,
    )  # fmt: skip
    return self._predicted(state, rows, logits, memory, at, low, high)

  @property
  def wide(self) -> bool:
    """Whether smoothing needs the logits of all columns of a pass. Under block-causal attention those
    after the block are nobody's to see."""
    causal = getattr(self.network, "block_length", None) is not None
    return self.config.smoothing is not None and not causal

  def _predicted(self, state: State, rows: jax.Array, logits, memory, at, low, high):
    """The block's logits among those of columns from `at_r` on; and with smoothing what they add to
    embeddings of these rows, in columns [low_r, high_r)."""
    smoothing = self.config.smoothing
    if smoothing is None:
      return logits, memory, None
    columns = at[:, None] + jnp.arange(logits.shape[1])
    here = (columns >= low[:, None]) & (columns < high[:, None]) & rows[:, None]
    mean = self.network.embed_softly(self.params, smoothing.probabilities(logits))
    mean = smoothing.at(state.iterations)[:, None, None] * mean
    soft = jnp.where(here[..., None], mean, take_columns(state.soft, at, logits.shape[1]))
    block = take_columns(logits, state.column - at, self.width)
    return block, memory, put_columns(state.soft, soft, at)

  def twice(self, x: jax.Array) -> jax.Array:
    """Rows once more for guidance, where there is any."""
    return jnp.concatenate([x, x]) if self.config.cfg_scale else x

  def _inputs(self, state: State):
    """Tokens, positions and segments; with guidance the second half sees MASK for what is given."""
    tokens = state.tokens
    if self.config.cfg_scale:
      tokens = jnp.concatenate([tokens, jnp.where(state.given, self.ids.mask, tokens)])
    return tokens, jax.tree.map(self.twice, self.positions), self.twice(state.segment_ids)

  def _guide(self, logits: jax.Array) -> jax.Array:
    """un + (cfg_scale + 1) (cond - un): unsupervised guidance (SMDM, arXiv 2410.18514)."""
    logits = logits.astype(jnp.float32)
    if not self.config.cfg_scale:
      return logits
    cond, un = jnp.split(logits, 2)
    return un + (self.config.cfg_scale + 1.0) * (cond - un)

  # --- From block to block ---

  def move_on(self, state: State) -> State:
    """Rows at their next block."""
    moved = state.column < state.end
    column = jnp.where(moved, state.column + self.width, state.column)
    return state.replace(
      column=jnp.minimum(column, jnp.maximum(state.end, state.column)), block=state.block + moved
    )

  def stop_at_eos(self, state: State) -> State:
    """Fills what follows an EOS of this block with EOS, and ends the row there."""
    columns = jnp.arange(state.tokens.shape[1])
    here = (columns >= state.column[:, None]) & (columns < state.column[:, None] + self.width)
    ends = here & (columns < state.end[:, None]) & ~state.given & is_any(state.tokens, self.ids.eos)
    ended = jnp.any(ends, axis=1)
    at = jnp.argmax(ends, axis=1)[:, None]
    token = jnp.take_along_axis(state.tokens, at, axis=1)
    rest = ended[:, None] & (columns > at) & (columns < state.end[:, None]) & ~state.given
    fill = rest & (state.tokens == self.ids.mask)
    last = jnp.take_along_axis(state.revealed_at, at, axis=1)
    return state.replace(
      tokens=jnp.where(fill, token, state.tokens),
      revealed_at=jnp.where(fill, last, state.revealed_at),
      end=jnp.where(ended, jnp.minimum(state.end, state.column + self.width), state.end),
    )


def fold_in(keys: jax.Array, data: jax.Array) -> jax.Array:
  return jax.vmap(jax.random.fold_in)(keys, data)


def split(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  pairs = jax.vmap(jax.random.split)(keys)  # [B, 2]
  return pairs[:, 0], pairs[:, 1]
