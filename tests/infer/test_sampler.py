"""The decoding loop against an independent transcription of LLaDA's, and its invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_denoise import EOS, MASK, PAD, PARAMS, VOCABULARY, numpy_denoise, toy_denoise

from lladax.infer import (
  KeepEos,
  LowEosConfidence,
  NoEosLogits,
  Random,
  SamplerConfig,
  Unmask,
  generate,
)
from lladax.infer.canvas import prompt_canvas
from lladax.infer.drawing import draw_tokens, token_probability
from lladax.infer.generate import row_keys
from lladax.infer.iteration import Ids, Step
from lladax.infer.network import as_network
from lladax.infer.state import start_state

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [], [5, 3, 5, 8, 9, 7, 9]]

run = functools.partial(
  generate, toy_denoise, PARAMS, mask_id=MASK, eos_id=EOS, pad_id=PAD, prompt_multiple=8
)


def numpy_generate(prompt, *, gen_length, steps, block_length, cfg_scale=0.0):
  """LLaDA's published greedy loop for one prompt, in NumPy. Returns tokens and passes used."""
  x = np.array([*prompt, *[MASK] * gen_length])
  given = x != MASK
  num_blocks = gen_length // block_length
  block_steps = steps // num_blocks
  passes = 0
  for block in range(num_blocks):
    start = len(prompt) + block * block_length
    end = start + block_length
    masks = int((x[start:end] == MASK).sum())
    per_step = [masks // block_steps] * block_steps
    for i in range(masks % block_steps):
      per_step[i] += 1
    for n in per_step:
      if not (x[start:end] == MASK).any():
        break  # what is left are passes that write nothing
      masked = x == MASK
      logits = numpy_denoise(x)
      passes += 1
      if cfg_scale > 0:
        un = numpy_denoise(np.where(given, MASK, x))
        logits = un + np.float32(cfg_scale + 1) * (logits - un)
        passes += 1
      logits[:, MASK] = -np.inf
      x0 = logits.argmax(-1)
      p = np.exp(logits - logits.max(-1, keepdims=True))
      p /= p.sum(-1, keepdims=True)
      confidence = np.take_along_axis(p, x0[:, None], -1)[:, 0]
      confidence[end:] = -np.inf
      confidence = np.where(masked, confidence, -np.inf)
      for place in np.argsort(-confidence, kind="stable")[:n]:
        x[place] = x0[place]
  return x.tolist(), passes


@pytest.mark.quick
@pytest.mark.parametrize(
  "gen_length,steps,block_length,cfg_scale",
  [(12, 12, 12, 0.0), (12, 6, 4, 0.0), (12, 9, 4, 0.0), (12, 24, 6, 0.0), (12, 6, 6, 1.5)],
)
def test_greedy_decoding_equals_the_published_loop(gen_length, steps, block_length, cfg_scale):
  config = SamplerConfig(
    gen_length=gen_length, steps=steps, block_length=block_length, cfg_scale=cfg_scale
  )
  result = run(PROMPTS, config)
  for row, prompt in enumerate(PROMPTS):
    tokens, passes = numpy_generate(
      prompt, gen_length=gen_length, steps=steps, block_length=block_length, cfg_scale=cfg_scale
    )
    assert result.row(row) == tokens
    assert result.nfe[row] == passes


@pytest.mark.parametrize("unmask", [Random(), SamplerConfig().unmask])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_invariants_of_every_trajectory(unmask, temperature):
  config = SamplerConfig(
    gen_length=12, steps=6, block_length=4, temperature=temperature, unmask=unmask
  )
  result = run(PROMPTS, config, seeds=3)
  for row, prompt in enumerate(PROMPTS):
    frames = result.frames(row)
    assert len(frames) == 7 and result.nfe[row] == 6
    assert (frames[:, : len(prompt)] == prompt).all()  # given tokens never change
    assert (frames[0, len(prompt) :] == MASK).all()
    assert (frames[-1] != MASK).all()
    masked = frames == MASK
    assert not (masked[1:] & ~masked[:-1]).any()  # nothing is masked again
    assert (np.where(masked[1:], 0, frames[1:] - frames[-1]) == 0).all()  # written once
    assert (masked.sum(axis=1) == [12, 10, 8, 6, 4, 2, 0]).all()  # two per iteration
    for block in range(3):  # from left to right
      place = slice(len(prompt) + 4 * block, len(prompt) + 4 * block + 4)
      assert not masked[2 * block + 2, place].any()
      assert masked[2 * block, place].all()


def test_confidence_is_the_probability_without_noise():
  config = SamplerConfig(gen_length=4, steps=4, block_length=4, temperature=1.5)
  result = run([[1, 2, 3]], config, seeds=5)
  frames, final = result.frames(0), result.row(0)
  when, confidence = result.revealed_at[0], result.confidence[0]
  for place in range(3, 7):
    logits = numpy_denoise(frames[when[place]]).astype(np.float64)[place]
    logits[MASK] = -np.inf
    expected = np.exp(logits[final[place]]) / np.exp(logits).sum()
    np.testing.assert_allclose(confidence[place], expected, rtol=1e-5)


def test_drawn_tokens_follow_the_tempered_distribution_like_the_published_formula():
  rows, temperature = 40_000, 0.8
  logits = np.array([2.0, 0.0, -1.0, 1.0, -np.inf], np.float32)
  keys = jax.vmap(jax.random.key)(np.arange(rows))
  drawn = draw_tokens(
    jnp.broadcast_to(logits, (rows, 1, 5)),
    keys,
    jnp.zeros((rows, 1), jnp.int32),
    temperature=temperature,
  )
  u = np.random.default_rng(0).uniform(size=(rows, 5))
  published = (np.exp(logits.astype(np.float64)) / (-np.log(u)) ** temperature).argmax(-1)
  probability = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  deviation = np.sqrt(probability * (1 - probability) / rows)
  for sample in (np.asarray(drawn)[:, 0], published):
    frequency = np.bincount(sample, minlength=5) / rows
    assert (np.abs(frequency - probability) <= 4 * deviation).all()


def test_temperature_zero_ignores_the_seed_and_higher_ones_do_not():
  greedy = SamplerConfig(gen_length=12, steps=6, block_length=4)
  assert run(PROMPTS, greedy, seeds=0).answers == run(PROMPTS, greedy, seeds=100).answers
  warm = SamplerConfig(gen_length=12, steps=6, block_length=4, temperature=0.7)
  assert run(PROMPTS, warm, seeds=0).answers == run(PROMPTS, warm, seeds=0).answers
  assert run(PROMPTS, warm, seeds=0).answers != run(PROMPTS, warm, seeds=100).answers


def likes(token, params_bias):
  """Parameters of a network that prefers a token everywhere, by a margin that shrinks with p."""
  own = np.zeros((64, VOCABULARY, VOCABULARY), np.float32)
  own[:, :, token] = params_bias
  return {"own": own, "far": np.zeros((128, VOCABULARY, VOCABULARY), np.float32)}


def test_mask_is_never_written_even_if_the_network_prefers_it():
  config = SamplerConfig(gen_length=8, steps=4, block_length=8, cfg_scale=1.0)
  params = likes(MASK, 1e4)
  result = generate(
    toy_denoise, params, PROMPTS, config, mask_id=MASK, eos_id=EOS, pad_id=PAD, prompt_multiple=8
  )
  assert not (result.tokens == MASK).any()
  assert np.isfinite(result.confidence).all()


def test_guidance_mixes_with_a_pass_that_does_not_see_what_was_given():
  canvas = prompt_canvas([[1, 2, 3]], 4, mask_id=MASK, pad_id=PAD, multiple=1)
  x = np.array([1, 2, 3, *[MASK] * 4])
  cond, un = numpy_denoise(x), numpy_denoise(np.where(x == MASK, x, MASK))
  for scale, expected in [(0.0, cond), (0.5, un + 1.5 * (cond - un))]:
    config = SamplerConfig(gen_length=4, steps=4, block_length=4, cfg_scale=scale)
    state = start_state(canvas, row_keys(0, 1), mask_id=MASK)
    ids = Ids(mask=MASK, eos=(EOS,))
    step = Step(as_network(toy_denoise), PARAMS, config, ids, 0, state.positions)
    block = step.begin(state)
    logits, memory, soft = step.read(block, step.active(block))
    assert memory is None and soft is None
    np.testing.assert_allclose(logits[0, :, :MASK], expected[3:, :MASK], rtol=1e-5, atol=1e-5)


def test_eos_policies():
  base = {"gen_length": 6, "steps": 6, "block_length": 6}
  params = likes(EOS, 256.0)

  def answers(eos):
    return generate(
      toy_denoise,
      params,
      [[1, 2]],
      SamplerConfig(**base, eos=eos),
      mask_id=MASK,
      eos_id=(EOS, 13),
      pad_id=PAD,
      prompt_multiple=8,
    )

  assert answers(KeepEos()).answers == [[]]
  never = answers(NoEosLogits())
  assert len(never.answers[0]) == 6 and not np.isin(never.row(0)[2:], [EOS, 13]).any()
  # Discouraged, EOS is still written where nothing else is likely.
  assert answers(LowEosConfidence()).answers == [[]]


def test_low_eos_confidence_ranks_eos_last_and_keeps_the_order_otherwise():
  tokens = jnp.array([[EOS, 3, 13, 4]])
  confidence = jnp.array([[0.99, 0.2, 0.5, 0.01]])
  lowered = np.asarray(LowEosConfidence().confidence(confidence, tokens, (EOS, 13)))
  assert np.argsort(-lowered[0]).tolist() == [1, 3, 0, 2]


def test_token_probability_is_a_softmax_in_float32():
  logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32) * 20
  tokens = np.array([[0, 6, 3], [1, 1, 2]])
  exact = np.exp(logits.astype(np.float64))
  exact /= exact.sum(-1, keepdims=True)
  expected = np.take_along_axis(exact, tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(token_probability(jnp.asarray(logits), tokens), expected, rtol=1e-5)


def test_a_rule_that_writes_nothing_ends_with_an_error_that_names_it():
  class Idle(Unmask):
    def __call__(self, confidence, masked, budget, key, iteration=None):
      return jnp.zeros_like(masked)

    def __repr__(self):
      return "Idle()"

  with pytest.raises(RuntimeError, match=r"Idle\(\) left 4 positions masked"):
    run([[1]], SamplerConfig(gen_length=4, steps=4, block_length=4, unmask=Idle()))


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"gen_length": 0}, "gen_length is at least 1; got 0"),
    ({"steps": -1}, "steps is at least 1; got -1"),
    ({"gen_length": 48, "block_length": 32}, "48 is not a multiple of block_length 32"),
    ({"gen_length": 16, "block_length": 32}, "16 is not a multiple of block_length 32"),
    ({"gen_length": 96, "steps": 100}, "steps 100 do not divide by the 3 blocks"),
    ({"temperature": -0.5}, "temperature is a finite number of at least 0; got -0.5"),
    ({"temperature": float("nan")}, "temperature.*nan"),
    ({"cfg_scale": -1.0}, "cfg_scale.*-1.0"),
  ],
)
def test_numbers_that_do_not_fit_are_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    SamplerConfig(**fields)
