"""Generation and infilling: batches, padding, compilation, what comes back, bad input."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from toy_denoise import EOS, MASK, PAD, PARAMS, toy_denoise, trace_count

from lladax.infer import Random, SamplerConfig, generate, infill

SPECIAL = {"mask_id": MASK, "eos_id": EOS, "pad_id": PAD}
GREEDY = SamplerConfig(gen_length=8, steps=4, block_length=4)
WARM = SamplerConfig(gen_length=8, steps=4, block_length=4, temperature=0.9, unmask=Random())

run = functools.partial(generate, toy_denoise, PARAMS, **SPECIAL)
fill = functools.partial(infill, toy_denoise, PARAMS, **SPECIAL)

token = st.integers(0, EOS - 1)
prompts_of_four = st.lists(st.lists(token, max_size=16), min_size=4, max_size=4)


@pytest.mark.quick
@pytest.mark.parametrize("config", [GREEDY, WARM])
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(prompts=prompts_of_four, seed=st.integers(0, 2**31))
def test_a_batch_gives_each_prompt_the_answer_it_gets_alone(config, prompts, seed):
  batched = run(prompts, config, seeds=seed, prompt_multiple=16)
  for row, prompt in enumerate(prompts):
    alone = run([prompt], config, seeds=seed + row, prompt_multiple=16)
    assert batched.row(row) == alone.row(0)
    assert batched.answers[row] == alone.answers[0]
    assert batched.nfe[row] == alone.nfe[0]
    np.testing.assert_array_equal(batched.frames(row), alone.frames(0))


@pytest.mark.parametrize("config", [GREEDY, WARM])
def test_padding_of_prompts_changes_nothing(config):
  prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
  tight = run(prompts, config, seeds=[7, 9], prompt_multiple=1)
  wide = run(prompts, config, seeds=[7, 9], prompt_multiple=16)
  assert tight.tokens.shape[1] == 5 + 8 and wide.tokens.shape[1] == 16
  assert [tight.row(r) for r in range(2)] == [wide.row(r) for r in range(2)]


# Of 5 to 8 or of 16 tokens: few shapes, few compilations.
piece = st.one_of(token, st.just(MASK))
row_to_fill = st.one_of(
  st.lists(piece, min_size=5, max_size=8), st.lists(piece, min_size=16, max_size=16)
)


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("config", [GREEDY, WARM])
@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(rows=st.lists(row_to_fill, min_size=3, max_size=3))
def test_infilling_writes_masks_only_and_each_row_as_if_alone(config, block_length, rows):
  # With a row of 16 tokens in every batch, so that a shorter one is padded.
  rows = [*rows, [MASK] * 16]
  filled = fill(rows, config, seeds=4, block_length=block_length)
  for index, row in enumerate(rows):
    answer = filled.answers[index]
    assert len(answer) == len(row) and MASK not in answer
    assert [a if r != MASK else MASK for a, r in zip(answer, row, strict=True)] == row
  alone = fill([rows[0]], config, seeds=4, block_length=block_length)
  assert alone.answers[0] == filled.answers[0]
  assert alone.nfe[0] == filled.nfe[0]


def test_infilling_a_tail_of_masks_is_generation():
  prompt, config = [3, 1, 4, 1], SamplerConfig(gen_length=8, steps=4, block_length=8)
  filled = fill([[*prompt, *[MASK] * 8]], config)
  assert filled.answers[0] == run([prompt], config).row(0)


def test_infilling_nothing_needs_no_pass():
  filled = fill([[1, 2, 3], [4, MASK]], GREEDY)
  assert filled.answers[0] == [1, 2, 3]
  assert filled.nfe[0] == 0 and filled.nfe[1] == 1
  assert filled.frames(0).tolist() == [[1, 2, 3]]


def test_calls_of_equal_shape_compile_once():
  config = SamplerConfig(gen_length=8, steps=8, block_length=2)  # not used elsewhere
  before = trace_count[0]
  first = run([[1, 2], [3]], config)
  traced = trace_count[0]
  assert traced > before
  params = {name: value + 1.0 for name, value in PARAMS.items()}
  again = generate(
    toy_denoise, params, [[7] * 9, [5, 6]], SamplerConfig(**vars(config)), seeds=9, **SPECIAL
  )
  assert trace_count[0] == traced  # another prompt, seed, params and an equal config
  assert first.tokens.shape == again.tokens.shape
  run([[1, 2], [3], [4]], config)
  assert trace_count[0] > traced  # another batch size


def test_temperatures_share_a_compilation():
  config = SamplerConfig(gen_length=8, steps=8, block_length=8, temperature=0.5, top_p=0.9)
  first = run([[1, 2]], config)
  traced = trace_count[0]
  warm = dataclasses.replace(config, temperature=5.0, top_p=0.99)
  assert run([[1, 2]], warm).answers != first.answers and trace_count[0] == traced
  assert run([[1, 2]], dataclasses.replace(config, temperature=0.0)).answers != first.answers
  assert trace_count[0] > traced  # nothing is drawn any more


def test_answers_end_before_the_first_eos_and_the_canvas_is_whole():
  result = run([[1, 2], [3, 4, 5], []], GREEDY)
  for row, prompt in enumerate([[1, 2], [3, 4, 5], []]):
    written = result.row(row)[len(prompt) :]
    assert len(written) == 8
    answer = result.answers[row]
    assert EOS not in answer and answer == written[: len(answer)]
    assert len(answer) == 8 or written[len(answer)] == EOS
  # With every token an end of text, nothing is left.
  ended = generate(
    toy_denoise, PARAMS, [[1, 2]], GREEDY, mask_id=MASK, eos_id=list(range(MASK)), pad_id=PAD
  )
  assert ended.answers == [[]]


def test_the_context_is_filled_to_the_last_token():
  result = run([[1] * 5, [2]], GREEDY, max_length=13)
  assert result.tokens.shape == (2, 13)  # and not 32
  assert len(result.row(0)) == 13


@pytest.mark.parametrize(
  "prompts,options,message",
  [
    ([], {}, "at least one"),
    ([[1], [2, MASK, 3]], {}, "prompt 1 contains MASK .id 15. at position 1.*infill"),
    ([[1] * 6], {"max_length": 13}, "prompt 0 has 6 tokens and gen_length is 8.*context of 13"),
    ([[1, -2]], {}, "row 0 holds a negative id, -2"),
    ([[1], [2]], {"seeds": [1]}, "2 rows and 1 seeds"),
  ],
)
def test_bad_prompts_are_errors(prompts, options, message):
  with pytest.raises(ValueError, match=message):
    run(prompts, GREEDY, **options)


@pytest.mark.parametrize(
  "rows,options,message",
  [
    ([], {}, "at least one"),
    ([[]], {}, "row 0 is empty"),
    ([[MASK] * 9], {"max_length": 8}, "row 0 has 9 tokens, more than the context of 8"),
    ([[MASK]], {"block_length": 0}, "block_length is at least 1.*got 0"),
  ],
)
def test_bad_rows_to_infill_are_errors(rows, options, message):
  with pytest.raises(ValueError, match=message):
    fill(rows, GREEDY, **options)


def test_padding_that_looks_like_mask_is_an_error():
  with pytest.raises(ValueError, match="pad_id and mask_id are both 15"):
    generate(toy_denoise, PARAMS, [[1]], GREEDY, mask_id=MASK, eos_id=EOS, pad_id=MASK)
