"""An engine without a network: what it writes is a function of the request alone, and it counts."""

import dataclasses
import threading

from lladax.infer import SamplerConfig
from lladax.infer.engine import Request, Update

EOS, MASK = 256, 257


def written(request: Request, config: SamplerConfig, column: int) -> int:
  """The byte that the stand-in writes at a column: a capital letter, now and then a blank."""
  temperature = config.temperature if request.temperature is None else request.temperature
  mix = hash((tuple(request.ids), request.seed, temperature, column, 7))
  return 32 if mix % 6 == 0 else 65 + mix % 26


@dataclasses.dataclass
class Row:
  request: Request
  column: int
  end: int
  iterations: int = 0


class StandIn:
  """Has the methods of `Engine`.

  Args:
    ends: at which column after the prompt a text of this prompt ends, or None.
    gate: a step waits for it; None: it never does.
    breaks: prompts at whose sight a step fails.
  """

  def __init__(self, config, *, slots=4, ends=None, gate=None, breaks=()):
    self.config, self._slots, self._ends, self._gate = config, slots, ends or {}, gate
    self._breaks = breaks
    self.rows: dict[int, Row] = {}
    self.most = self.steps = self._next = 0
    self.cancelled, self.threads = [], set()

  @property
  def free(self) -> int:
    return self._slots - len(self.rows)

  def add(self, request: Request) -> int:
    self.threads.add(threading.get_ident())
    assert self.free
    if request.ids and request.ids[0] == 0:
      raise ValueError("this stand-in takes no prompt that begins with 0")
    length = len(request.ids)
    new = request.gen_length or self.config.gen_length
    row = Row(request, 0, length) if request.infill else Row(request, length, length + new)
    ticket, self._next = self._next, self._next + 1
    self.rows[ticket] = row
    self.most = max(self.most, len(self.rows))
    return ticket

  def step(self) -> list[Update]:
    self.threads.add(threading.get_ident())
    if self._gate is not None:
      assert self._gate.acquire(timeout=20)
    self.steps += 1
    if any(tuple(row.request.ids) in self._breaks for row in self.rows.values()):
      raise ValueError("no such shape, says the stand-in")
    return [self._block(ticket, row) for ticket, row in list(self.rows.items())]

  def cancel(self, ticket: int):
    self.cancelled.append(ticket)
    self.rows.pop(ticket, None)

  def _block(self, ticket: int, row: Row) -> Update:
    request, config = row.request, self.config
    first = 0 if request.infill else len(request.ids)
    columns = range(row.column, min(row.column + config.block_length, row.end))
    tokens, when, sure = [], [], []
    for column in columns:
      given = request.infill and request.ids[column] != MASK
      token = request.ids[column] if given else written(request, config, column)
      if not given and column - first == self._ends.get(tuple(request.ids)):
        token = EOS
      tokens.append(token)
      when.append(-1 if given else row.iterations + column % 2)
      sure.append(0.0 if given else 0.5 + column % 2 / 4)
    row.iterations += 2
    row.column = columns.stop
    done = row.column >= row.end or EOS in tokens
    if done:
      del self.rows[ticket]
    return Update(
      ticket=ticket, first=columns.start - first, tokens=tokens, revealed_at=when, confidence=sure,
      done=done, nfe=row.iterations,
    )  # fmt: skip
