"""Rows that come and go at block boundaries: continuous batching for whoever serves requests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from lladax.infer.canvas import Canvas, masked_canvas, prompt_canvas
from lladax.infer.config import SamplerConfig
from lladax.infer.earlier import Earlier, earlier_tokens
from lladax.infer.generate import as_ids, check_network, empty, row_keys
from lladax.infer.iteration import Ids
from lladax.infer.network import DenoiseFn, Network, as_network
from lladax.infer.sampler import decode_block, window_rest
from lladax.infer.state import State, start_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is to be written.

  Attributes:
    ids: of the prompt; for infilling the whole row, with MASK wherever something is to be written.
    gen_length: tokens to write after the prompt; None: as many as the sampler says.
    seed: of the row; only read if something is drawn.
    temperature, top_p: None: the sampler's. They compile nothing anew, so that it must be one of a
      sampler that draws just where this one does; see `SamplerConfig.program`.
    infill: whether `ids` is a row to fill.
  """

  ids: Sequence[int]
  gen_length: int | None = None
  seed: int = 0
  temperature: float | None = None
  top_p: float | None = None
  infill: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
  """A block of a request.

  Attributes:
    ticket: which request.
    first: the block's first column, counted from the end of the prompt (of the row's start for
      infilling); negative where blocks are aligned and the block holds the end of the prompt.
    tokens: ids of the block.
    revealed_at: in which iteration of the row each was written, from 0; -1 where it was given.
    confidence: with which each was written; 0 where it was given.
    done: whether it is the last one.
    nfe: passes of the network that the row has needed so far.
    earlier: where written tokens may change, what those of the block read before, by iteration.
  """

  ticket: int
  first: int
  tokens: list[int]
  revealed_at: list[int]
  confidence: list[float]
  done: bool
  nfe: int
  earlier: Sequence[Earlier] = ()


class Engine:
  """Decodes requests together, one block of each at a time. Not for several threads at once.

  A request's answer is a function of the request and the sampler: who else is there, when it came
  and in which slot changes nothing.

  Args:
    network, params: see `Network`.
    config: how all of them are decoded.
    slots: B, the most requests at a time; all of them are computed, whether in use or not.
    length: S, room for a prompt and what is written after it.
    mask_id, pad_id: special ids.
    eos_ids: those that end a text.

  Raises:
    ValueError: for a sampler that does not go with the network, or without a slot.
  """

  def __init__(
    self,
    network: Network | DenoiseFn,
    params: object,
    config: SamplerConfig,
    *,
    slots: int,
    length: int,
    mask_id: int,
    eos_ids: int | Sequence[int],
    pad_id: int,
  ):
    if slots < 1:
      raise ValueError(f"an engine has at least one slot, got {slots}")
    self._network, self._params = as_network(network), params
    self._sampler, self._config = config, config.program
    check_network(self._network, config)
    self._ids, self._pad_id, self._length = Ids(mask=mask_id, eos=as_ids(eos_ids)), pad_id, length
    kept = empty(self._network, (slots, length), config)
    zeros = np.zeros((slots, length), np.int32)
    nowhere = np.zeros(slots, np.int32)
    canvas = Canvas(zeros + pad_id, zeros, nowhere, nowhere, nowhere)
    self._state = start_state(canvas, row_keys(0, slots), mask_id=mask_id, **config.drawing, **kept)
    self._tickets: list[int | None] = [None] * slots
    self._column = np.zeros(slots, np.int64)
    self._end = np.zeros(slots, np.int64)
    self._first = np.zeros(slots, np.int64)
    self._iterations = np.zeros(slots, np.int64)
    self._next = 0

  @property
  def free(self) -> int:
    """Slots without a request."""
    return self._tickets.count(None)

  def check(self, request: Request):
    """Whether a request can be decoded here.

    Raises:
      ValueError: see `prompt_canvas` and `masked_canvas`; for one that is too long, or that is drawn
        where the sampler is not, or the other way round.
    """
    self._canvas(request)
    self._drawing(request)

  def add(self, request: Request) -> int:
    """Puts a request into a free slot; its ticket.

    Raises:
      ValueError: as `check`, or without a free slot.
    """
    canvas, drawing = self._canvas(request), self._drawing(request)
    if not self.free:
      raise ValueError(f"all {len(self._tickets)} slots are taken; wait for one to be done")
    slot, ticket = self._tickets.index(None), self._next
    keys = row_keys([request.seed], 1)
    row = start_state(canvas, keys, mask_id=self._ids.mask, **drawing)
    # A row's first pass renews what is kept of it.
    kept = {"memory": self._state.memory, "soft": self._state.soft}
    rest = self._state.replace(memory=None, soft=None)
    self._state = _put_row(rest, row, slot).replace(**kept)
    self._tickets[slot], self._next = ticket, ticket + 1
    for of_slots, value in (
      (self._column, canvas.column), (self._end, canvas.end), (self._first, canvas.first),
      (self._iterations, [0]),
    ):  # fmt: skip
      of_slots[slot] = value[0]
    return ticket

  def step(self) -> list[Update]:
    """Decodes the next block of every request; those that are done leave."""
    if self.free == len(self._tickets):
      return []
    width, before = self._config.block_length, self._column.copy()
    rest = window_rest(self._config, int(np.max(self._end - self._column)))
    self._state = decode_block(
      self._network, self._params, self._state, config=self._config, ids=self._ids, rest=rest
    )
    seen = jax.device_get(self._state.replace(memory=None, soft=None, keys=None))
    self._state = self._state.replace(history=None)
    self._column, self._end = seen.column.astype(np.int64), seen.end.astype(np.int64)
    begun, self._iterations = self._iterations, seen.iterations.astype(np.int64)
    updates = []
    for slot, ticket in enumerate(self._tickets):
      if ticket is None:
        continue
      block = slice(before[slot], min(before[slot] + width, self._end[slot]))
      done = bool(self._column[slot] >= self._end[slot])
      updates.append(
        Update(
          ticket=ticket,
          first=int(before[slot] - self._first[slot]),
          tokens=seen.tokens[slot, block].tolist(),
          revealed_at=seen.revealed_at[slot, block].tolist(),
          confidence=seen.confidence[slot, block].tolist(),
          done=done,
          nfe=int(seen.nfe[slot]),
          earlier=self._earlier(seen, slot, block, int(begun[slot])),
        )
      )
      if done:
        self._tickets[slot] = None
    return updates

  def _earlier(self, seen: State, slot: int, block: slice, begun: int) -> list[Earlier]:
    if seen.history is None:
      return []
    count, width = seen.iterations[slot] - begun, block.stop - block.start
    return earlier_tokens(
      *(x[:count, slot, :width] for x in (seen.history.tokens, seen.history.confidence)),
      seen.revealed_at[slot, block], first=begun, mask_id=self._ids.mask,
    )  # fmt: skip

  def _drawing(self, request: Request) -> dict[str, float | None]:
    given = {"temperature": request.temperature, "top_p": request.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    asked = dataclasses.replace(self._sampler, **given)
    if asked.program != self._config:
      raise ValueError(
        f"temperature {asked.temperature} with top_p {asked.top_p} is another program than "
        f"{self._sampler.temperature} with {self._sampler.top_p}; use another engine"
      )
    return asked.drawing

  def cancel(self, ticket: int):
    """Frees the slot of a request; nothing happens to one that is done."""
    if ticket in self._tickets:
      slot = self._tickets.index(ticket)
      self._tickets[slot] = None
      self._end[slot] = self._column[slot]
      end = self._state.end.at[slot].set(int(self._column[slot]))
      self._state = self._state.replace(end=end)

  def _canvas(self, request: Request) -> Canvas:
    config, ids = self._config, list(request.ids)
    shared = {
      "mask_id": self._ids.mask, "pad_id": self._pad_id, "block_length": config.block_length,
      "max_length": self._length, "multiple": self._length,
    }  # fmt: skip
    if request.infill:
      canvas = masked_canvas([ids], **shared)
    else:
      length = config.gen_length if request.gen_length is None else request.gen_length
      if length < 1:
        raise ValueError(f"gen_length is at least 1, got {length}")
      canvas = prompt_canvas([ids], length, align=config.align_blocks, **shared)
    if canvas.tokens.shape[1] > self._length:
      raise ValueError(
        f"{len(ids)} ids with what is to be written do not fit {self._length} columns in whole "
        f"blocks of {config.block_length}"
      )
    return canvas


@functools.partial(jax.jit, donate_argnums=0)
def _put_row(state: State, row: State, slot) -> State:
  return jax.tree.map(lambda x, new: x.at[slot].set(new[0]), state, row)
