"""The engine's answers are those of `generate`, whoever comes and goes."""

import dataclasses
import functools

import pytest
from toy_denoise import EOS, MASK, PAD, PARAMS, toy_denoise

from lladax.infer import Engine, Random, Request, SamplerConfig, generate, infill
from lladax.infer.generate import cut_at_eos, infill_config

CONFIG = SamplerConfig(
  gen_length=8, steps=4, block_length=4, temperature=0.9, top_p=0.95, unmask=Random()
)
REQUESTS = [
  Request(ids=[3, 1, 4, 1, 5], seed=1),
  Request(ids=[2, 7], seed=2, gen_length=3, temperature=3.0),
  Request(ids=[], seed=3),
  Request(ids=[9, 2, 6, 5, 3, 5, 8], seed=4, gen_length=12, temperature=2.0, top_p=0.5),
  Request(ids=[1, 4], seed=5, gen_length=1),
  Request(ids=[1, MASK, 3, 4, 5, MASK, MASK], seed=6, infill=True),
]


def engine(config=CONFIG, slots=2, length=24):
  return Engine(
    toy_denoise, PARAMS, config, slots=slots, length=length, mask_id=MASK, eos_ids=EOS, pad_id=PAD
  )


@functools.cache
def expected(request: int, config=CONFIG) -> tuple[list[int], int]:
  """The whole row, and its passes."""
  request = REQUESTS[request]
  own = {"temperature": request.temperature, "top_p": request.top_p}
  own = {name: value for name, value in own.items() if value is not None}
  config = dataclasses.replace(config, **own)
  options = {"mask_id": MASK, "eos_id": EOS, "pad_id": PAD, "seeds": [request.seed]}
  if request.infill:
    result = infill(toy_denoise, PARAMS, [request.ids], config, block_length=4, **options)
  else:
    lengths = [request.gen_length or config.gen_length]
    result = generate(
      toy_denoise, PARAMS, [request.ids], config, gen_lengths=lengths, prompt_multiple=24, **options
    )
  return result.row(0), int(result.nfe[0])


def serve(engine, order, cancel=None):
  """Rows and passes of the requests, each put in as soon as there is room."""
  waiting, rows, passes, done = list(order), {}, {}, set()
  tickets = {}
  while waiting or tickets:
    while waiting and engine.free:
      index = waiting.pop(0)
      tickets[engine.add(REQUESTS[index])] = index
      rows[index] = [] if REQUESTS[index].infill else list(REQUESTS[index].ids)
    for update in engine.step():
      index = tickets[update.ticket]
      start = 0 if REQUESTS[index].infill else len(REQUESTS[index].ids)
      assert len(rows[index]) == start + update.first
      assert len(update.tokens) == len(update.revealed_at) == len(update.confidence)
      rows[index] += update.tokens
      passes[index] = update.nfe
      if update.done:
        done.add(tickets.pop(update.ticket))
      elif index == cancel:
        engine.cancel(update.ticket)
        tickets.pop(update.ticket)
  return {index: (rows[index], passes[index]) for index in done}


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 0, 4, 2, 1]])
def test_answers_do_not_depend_on_who_comes_when(order):
  got = serve(engine(), order)
  assert got == {index: expected(index) for index in set(order)}


def test_one_that_is_cancelled_changes_nothing_for_the_others():
  got = serve(engine(), [3, 0, 1, 2], cancel=3)
  assert got == {index: expected(index) for index in (0, 1, 2)}


def test_a_row_ends_with_the_block_that_ends_its_text():
  config = dataclasses.replace(CONFIG, gen_length=16, steps=8, early_stop=True, temperature=2.0)
  whole = dataclasses.replace(config, early_stop=False)
  stopped = 0
  for seed in range(6):
    request = Request(ids=[1, 2], seed=seed)
    one = engine(config, slots=1)
    ticket = one.add(request)
    updates = []
    while not updates or not updates[-1].done:
      updates += one.step()
    got = [token for update in updates for token in update.tokens]
    options = {"mask_id": MASK, "eos_id": EOS, "pad_id": PAD, "prompt_multiple": 24}
    full = generate(toy_denoise, PARAMS, [[1, 2]], whole, seeds=[seed], **options)
    assert cut_at_eos(got, (EOS,)) == full.answers[0]
    assert updates[0].ticket == ticket and one.free == 1
    blocks = min(4, len(full.answers[0]) // 4 + 1)
    assert len(updates) == blocks and updates[-1].nfe == 2 * blocks <= full.nfe[0]
    stopped += blocks < 4
    short = generate(toy_denoise, PARAMS, [[1, 2]], config, seeds=[seed], **options)
    assert short.answers == full.answers and short.nfe[0] == updates[-1].nfe
  assert stopped


def test_what_does_not_fit_is_refused_and_nothing_is_lost():
  one = engine(slots=1)
  with pytest.raises(ValueError, match="exceed the context of 24"):
    one.check(Request(ids=[1] * 20))
  with pytest.raises(ValueError, match="in whole blocks of 4"):
    one.check(Request(ids=[1] * 15, gen_length=9))
  with pytest.raises(ValueError, match="gen_length is at least 1, got 0"):
    one.check(Request(ids=[1], gen_length=0))
  with pytest.raises(ValueError, match="temperature 0.0 with top_p 0.95 is another program"):
    one.check(Request(ids=[1], temperature=0.0))
  with pytest.raises(ValueError, match="prompt 0 contains MASK"):
    one.add(Request(ids=[MASK]))
  assert one.step() == [] and one.free == 1
  one.add(REQUESTS[0])
  with pytest.raises(ValueError, match="all 1 slots are taken"):
    one.add(REQUESTS[1])
  one.cancel(17)
  assert one.free == 0
  with pytest.raises(ValueError, match="at least one slot, got 0"):
    engine(slots=0)


def test_an_infilled_row_is_one_block_or_several():
  config = infill_config(CONFIG, None, 7)
  assert (config.block_length, config.steps_per_block) == (7, CONFIG.steps)
  config = infill_config(CONFIG, 2, 7)
  assert (config.block_length, config.steps_per_block) == (2, CONFIG.steps_per_block)
