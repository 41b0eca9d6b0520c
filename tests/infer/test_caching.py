"""Laws of the caches on a small network: what is exact, what is the row's own, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.infer import (
  BlockCausal,
  Credit,
  DualCache,
  EditTokens,
  Engine,
  Entropy,
  Hierarchical,
  NoCache,
  PrefixCache,
  RemaskLow,
  Request,
  SamplerConfig,
  Smoothing,
  Threshold,
  Vicinity,
  generate,
  infill,
)
from lladax.infer.caching import Cache
from lladax.infer.earlier import earlier_texts, shown
from lladax.models import Denoiser, for_inference, init_params, tiny

MASK, EOS, PAD = 30, 31, 31
CONFIG = dataclasses.replace(
  tiny(),
  vocab_size=32,
  hidden_size=32,
  num_hidden_layers=2,
  max_position_embeddings=128,
  mask_token_id=MASK,
  eos_token_id=EOS,
  pad_token_id=PAD,
  initializer_range=0.3,  # so that what is written depends on what is there
)
# None of them empty: on a canvas of masks alone all positions tie, and rounding chooses.
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1], [4]]
BASE = SamplerConfig(gen_length=16, steps=16, block_length=8)
CACHES = (
  PrefixCache(), DualCache(), DualCache(refresh_every=2), Vicinity(before=3, after=2, warmup=2)
)  # fmt: skip


@functools.cache
def weights():
  return init_params(CONFIG, jax.random.key(3))


def run(config, prompts=PROMPTS, *, network=None, params=None, **options):
  network = Denoiser(CONFIG) if network is None else network
  params = weights() if params is None else params
  return generate(
    network, params, prompts, config, mask_id=MASK, eos_id=EOS, pad_id=PAD, prompt_multiple=16,
    **options,
  )  # fmt: skip


def texts(result):
  return [result.row(r) for r in range(len(result.tokens))]


@pytest.mark.parametrize(
  "cache",
  [DualCache(refresh_every=1), pytest.param(PrefixCache(refresh_every=1), marks=pytest.mark.slow)],
)
def test_refreshed_in_every_step_is_no_cache(cache):
  plain, cached = run(BASE), run(dataclasses.replace(BASE, cache=cache))
  assert texts(cached) == texts(plain)
  np.testing.assert_array_equal(cached.nfe, plain.nfe)
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)


@pytest.mark.parametrize(
  "shift, apart, block_length",
  [(True, True, None), *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [(False, True, None), (True, False, None), (False, False, None), (True, True, 8)]
  )],
)  # fmt: skip
def test_a_window_reads_what_the_whole_does_while_nothing_has_changed(shift, apart, block_length):
  """Of layers that are `apart` the last one computes no more columns than are asked for."""
  config, params = dataclasses.replace(CONFIG, shift=shift), weights()
  network = Denoiser(config, block_length)
  tokens = jax.random.randint(jax.random.key(0), (3, 24), 0, 30)
  segments = jnp.ones((3, 24), jnp.int32).at[1, 20:].set(0)
  positions = jnp.broadcast_to(jnp.arange(24), (3, 24))
  at, canvas = jnp.array([4, 11, 0]), (tokens, positions, segments)
  everywhere = jax.jit(network)(weights(), *canvas)
  if apart:
    config, params = for_inference(config, weights())
    network = Denoiser(config, block_length)
  logits, memory = jax.jit(functools.partial(network.read, width=8, keep=True))(
    params, *canvas, at=at
  )
  start = jnp.maximum(at - network.look_behind, 0)
  window, kept = jax.jit(
    functools.partial(network.read_window, width=8, size=12 + network.look_behind)
  )(params, *canvas, at=at, memory=memory, start=start)
  np.testing.assert_allclose(window, logits, atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), kept, memory)
  for row in range(3):
    np.testing.assert_allclose(logits[row], everywhere[row, at[row] : at[row] + 8], atol=2e-5)
  # Changed columns change what is kept of them, and of no others; rows that are left out keep all.
  changed = (jnp.where(tokens == 5, 6, 5), positions, segments)
  _, kept = jax.jit(functools.partial(network.read_window, width=8, size=8))(
    params, *changed, at=at, memory=memory, start=at, refresh=(at + 2, at + 5),
    rows=jnp.array([True, False, False]),
  )  # fmt: skip
  for old, new in zip(jax.tree.leaves(memory), jax.tree.leaves(kept), strict=True):
    differs = np.abs(np.asarray(old - new)).max((-2, -1)) > 0
    differs = differs.reshape(-1, 3, 24).any(0)  # [B, S], of all layers
    assert differs[0].nonzero()[0].tolist() == [6, 7, 8] and not differs[1:].any()


BY_BLOCKS = dataclasses.replace(BASE, gen_length=24, steps=24, align_blocks=True)
EXACT = {
  "plain": {},
  "drawn": {"unmask": Threshold(0.3), "temperature": 0.7},
  "ended": {"early_stop": True, "temperature": 20.0},
  "guided": {"cfg_scale": 1.0},
  "edited": {"unmask": Threshold(0.1), "edit": EditTokens(0.05, extra_steps=3)},
  "smoothed": {"smoothing": Smoothing()},
  "shifted": {},
  "apart": {},
}


USUAL = ("plain", "drawn", "ended", "apart", "dual", "vicinity")


def others_slow(names):
  return [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", others_slow(EXACT))
def test_block_causal_cache_is_exact(name):
  network = Denoiser(dataclasses.replace(CONFIG, shift=name == "shifted"), block_length=8)
  config = dataclasses.replace(BY_BLOCKS, **EXACT[name])
  plain = run(config, network=network, seeds=4)
  params = weights()
  if name == "apart":
    of_network, params = for_inference(CONFIG, weights())
    network = Denoiser(of_network, block_length=8)
  cached = dataclasses.replace(config, cache=BlockCausal())
  cached = run(cached, network=network, params=params, seeds=4)
  assert texts(cached) == texts(plain)
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)
  np.testing.assert_array_equal(cached.nfe, plain.nfe)
  for row in range(len(PROMPTS)):
    np.testing.assert_array_equal(cached.frames(row), plain.frames(row))
  if name == "ended":
    assert cached.nfe.min() < 24


def test_a_block_with_nothing_to_write_is_read_once():
  network, full = Denoiser(CONFIG, block_length=8), list(range(8))
  config = dataclasses.replace(BY_BLOCKS, unmask=Threshold(0.3, start=1.0, decay=0.1))
  some = [1, 2, MASK, MASK, MASK, 3, 4, 5]
  rows = [full + some + full + some, some + full + full + some + full, some + some + some + full]
  options = {"mask_id": MASK, "eos_id": EOS, "pad_id": PAD, "block_length": 8}
  plain = infill(network, weights(), rows, config, **options)
  cached = infill(
    network, weights(), rows, dataclasses.replace(config, cache=BlockCausal()), **options
  )
  assert texts(cached) == texts(plain)
  # Between the first block that is written and the last of the row.
  np.testing.assert_array_equal(cached.nfe, plain.nfe + np.array([1, 2, 0]))
  np.testing.assert_array_equal(cached.revealed_at, plain.revealed_at)


def test_rows_of_an_engine_begin_while_others_are_at_later_blocks():
  ready, params = for_inference(CONFIG, weights())
  config = dataclasses.replace(
    BY_BLOCKS, unmask=Threshold(0.3), temperature=0.7, cache=BlockCausal()
  )
  ids = {"mask_id": MASK, "eos_ids": EOS, "pad_id": PAD}
  engine = Engine(Denoiser(ready, block_length=8), params, config, slots=2, length=48, **ids)
  waiting = [
    Request(ids=prompt, seed=9 + row, gen_length=length)
    for row, (prompt, length) in enumerate(zip(PROMPTS, [9, 24, 16], strict=True))
  ]
  rows = [list(request.ids) for request in waiting]
  passes, number = [0] * 3, 0
  while waiting or engine.free < 2:
    if waiting and engine.free:  # one at a time, so that nobody begins with somebody else
      number = engine.add(waiting.pop(0))
    for update in engine.step():
      rows[update.ticket] += update.tokens[max(0, -update.first) :]
      passes[update.ticket] = update.nfe
  assert number == 2
  plain = dataclasses.replace(config, cache=NoCache())
  network = Denoiser(CONFIG, block_length=8)
  want = run(plain, network=network, seeds=9, gen_lengths=[9, 24, 16])
  assert rows == texts(want) and passes == want.nfe.tolist()


SAMPLERS = {
  "dual": {"cache": DualCache(), "unmask": Threshold(0.3)},
  "prefix": {"cache": PrefixCache(), "unmask": Entropy(alg_temp=0.5), "temperature": 0.7},
  "vicinity": {
    "cache": Vicinity(before=3, after=2, warmup=2), "unmask": Threshold(0.2, start=1.0, decay=0.1),
    "smoothing": Smoothing(), "early_stop": True,
  },
  "guided": {"cache": DualCache(refresh_every=3), "cfg_scale": 1.0, "credit": Credit()},
  "edited": {"unmask": Hierarchical(0.3, 0.1), "edit": EditTokens(0.1), "top_p": 0.9},
  "remasked": {"unmask": Threshold(0.05), "edit": RemaskLow(0.3), "cache": DualCache()},
}  # fmt: skip


@pytest.mark.parametrize("name", others_slow(SAMPLERS))
def test_a_row_is_decoded_as_if_it_were_alone(name):
  config = dataclasses.replace(BASE, **SAMPLERS[name])
  lengths = [16, 5, 9]
  together = run(config, seeds=5, gen_lengths=lengths)
  assert not (together.row(0).count(MASK) or together.row(1).count(MASK))
  for row, prompt in enumerate(PROMPTS):
    alone = run(config, [prompt], seeds=5 + row, gen_lengths=lengths[row : row + 1])
    assert alone.row(0) == together.row(row)
    assert together.row(row)[: len(prompt)] == prompt
    assert len(together.row(row)) == len(prompt) + lengths[row]
    assert alone.nfe[0] == together.nfe[row]
    np.testing.assert_array_equal(alone.frames(0), together.frames(row))


def test_block_causal_rows_are_their_own():
  network = Denoiser(CONFIG, block_length=8)
  config = dataclasses.replace(
    BASE, align_blocks=True, cache=BlockCausal(), unmask=Threshold(0.3), temperature=0.5
  )
  together = run(config, network=network, seeds=2)
  for row, prompt in enumerate(PROMPTS):
    alone = run(config, [prompt], network=network, seeds=2 + row)
    assert (alone.row(0), alone.nfe[0]) == (together.row(row), together.nfe[row])


def test_the_caches_are_not_all_the_same():
  """Else the laws above would hold of caches that are never read."""
  results = {str(texts(run(dataclasses.replace(BASE, cache=c)))) for c in (NoCache(), *CACHES)}
  assert len(results) >= 3


@pytest.mark.slow
def test_passes_are_counted_by_what_the_policy_reads():
  config = dataclasses.replace(BASE, cache=Vicinity(before=3, after=2, warmup=2))
  assert run(config).nfe.tolist() == [16] * 3
  assert run(dataclasses.replace(config, cfg_scale=0.5)).nfe.tolist() == [32] * 3


def test_smoothing_of_weight_zero_is_none_and_of_more_is_not():
  plain = run(BASE)
  none = run(dataclasses.replace(BASE, smoothing=Smoothing(weight=0.0)))
  some = run(dataclasses.replace(BASE, smoothing=Smoothing(weight=0.9, start=0.9)))
  assert texts(none) == texts(plain) != texts(some)


def test_what_does_not_go_together_is_refused():
  with pytest.raises(ValueError, match="block_length=8.*which is None here"):
    run(dataclasses.replace(BASE, cache=BlockCausal()))
  with pytest.raises(ValueError, match="keeps no keys and values"):
    run(dataclasses.replace(BASE, cache=DualCache()), network=lambda *a: None)
  with pytest.raises(ValueError, match="refresh_every is at least 1.*got 0"):
    DualCache(refresh_every=0)
  with pytest.raises(ValueError, match="warmup is at least 0; got -1"):
    Vicinity(warmup=-1)


def test_every_policy_is_a_value_and_reads_the_whole_first():
  for cache in (*CACHES, NoCache(), BlockCausal()):
    assert isinstance(cache, Cache) and type(cache)(**vars(cache)) == cache
    hash(cache)
    zeros = jnp.zeros(3, jnp.int32)
    assert cache.whole(jnp.int32(0), zeros).all()


@pytest.mark.parametrize("edit", [EditTokens(0.05), RemaskLow(0.95)])
def test_frames_show_what_was_written_and_taken_back(edit):
  config = dataclasses.replace(BASE, edit=edit)
  result = run(config)
  changes = 0
  for row, prompt in enumerate(PROMPTS):
    frames = result.frames(row)
    assert (frames[:, : len(prompt)] == prompt).all() and (frames[-1] == result.row(row)).all()
    assert (frames[0, len(prompt) :] == MASK).all()
    assert len(frames) == result.nfe[row] + 1
    before, after = frames[:-1], frames[1:]
    changes += int(((before != MASK) & (before != after)).sum())
    # The last time a token was written is what is said of it.
    when = result.revealed_at[row][result.is_text[row]]
    for place in range(len(prompt), frames.shape[1]):
      assert (frames[when[place] + 1 :, place] == frames[-1, place]).all()
  assert changes > 0
  for row, updates in enumerate(engine_updates(config)):
    tokens, when, sure = ([] for _ in range(3))
    earlier = []
    for update in updates:
      earlier += [dataclasses.replace(e, place=e.place + len(tokens)) for e in update.earlier]
      tokens += update.tokens
      when += update.revealed_at
      sure += update.confidence
    assert len(earlier) >= 1 and all((e.confidence > 0) == (e.token is not None) for e in earlier)
    texts = earlier_texts(earlier, lambda ids: f"{ids[0]}")
    for number, frame in enumerate(result.frames(row)[:, len(PROMPTS[row]) :]):
      places = shown([f"{token}" for token in tokens], when, sure, number, texts)
      assert [MASK if place is None else int(place.text) for place in places] == frame.tolist()


def engine_updates(config):
  """The updates of each prompt, in the shapes that `run` has compiled."""
  ids = {"mask_id": MASK, "eos_ids": EOS, "pad_id": PAD}
  engine = Engine(Denoiser(CONFIG), weights(), config, slots=3, length=32, **ids)
  for prompt in PROMPTS:
    engine.add(Request(ids=prompt))
  updates = [[] for _ in PROMPTS]
  while engine.free < 3:
    for update in engine.step():
      updates[update.ticket].append(update)
  return updates
