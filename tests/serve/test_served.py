"""What fits into a served model, and what it cannot do."""

import dataclasses

import pytest

from lladax.infer import BlockCausal
from lladax.infer.engine import Request
from lladax.serve import Ask, RequestError, Served


@pytest.mark.parametrize("align", [False, True])
def test_the_room_is_what_the_engine_takes(text_model, align):
  config = dataclasses.replace(text_model.sampler, align_blocks=align)
  mask = text_model.config.mask_token_id
  for length in (9, 12, 16, 21):
    served = Served(model=text_model, name="tiny", length=length)
    served.check()
    assert served.room(config, 1) > 0  # so an answer can be decoded to begin with
    engine = text_model.engine(sampler=config, slots=1, length=length)
    for given in range(1, length + 2):
      room, gap = served.room(config, given), served.room(config, given, infill=True)
      if room:
        engine.check(Request(ids=[1] * given, gen_length=room))
      if gap:
        engine.check(Request(ids=[1] * given + [mask] * gap, infill=True))
      with pytest.raises(ValueError):
        engine.check(Request(ids=[1] * given, gen_length=room + 1))
      with pytest.raises(ValueError):
        engine.check(Request(ids=[1] * given + [mask] * (gap + 1), infill=True))


def test_a_sampler_that_cannot_be_is_an_error_before_anything_is_compiled(text_model):
  sampler = dataclasses.replace(text_model.sampler, cache=BlockCausal())
  model = dataclasses.replace(text_model, sampler=sampler)
  with pytest.raises(ValueError, match="align_blocks=True, which is False"):
    Served(model=model, name="tiny", length=96).check()


def test_a_model_that_does_not_see_what_follows_fills_no_gap(text_model):
  served = Served(model=text_model, name="tiny", length=96)
  causal = dataclasses.replace(text_model.sampler, cache=BlockCausal(), align_blocks=True)
  assert served.rows(Ask(prompts=("a",)), causal)
  with pytest.raises(RequestError, match="suffix: this model writes block after block"):
    served.rows(Ask(prompts=("a",), suffix="b"), causal)
