"""What a block's passes share is made once: the tables that turn queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.infer import DualCache, NoCache, SamplerConfig
from lladax.infer.canvas import prompt_canvas
from lladax.infer.generate import row_keys
from lladax.infer.iteration import Ids
from lladax.infer.sampler import decode_block
from lladax.infer.state import start_state
from lladax.models import Denoiser, init_params, tiny

CONFIG = tiny(vocab_size=32, hidden_size=16, num_hidden_layers=2, mask_token_id=30)


def within_loops(jaxpr, inside=False):
  """Names of all primitives in the bodies of while loops."""
  for eqn in jaxpr.eqns:
    if inside:
      yield eqn.primitive.name
    for value in eqn.params.values():
      for part in value if isinstance(value, tuple | list) else [value]:
        part = getattr(part, "jaxpr", part)
        if hasattr(part, "eqns"):
          yield from within_loops(part, inside or eqn.primitive.name == "while")


@pytest.mark.parametrize("cache", [NoCache(), DualCache()])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_no_cosine_is_taken_in_the_loop(cache, cfg_scale):
  network, rows = Denoiser(CONFIG), 2
  config = SamplerConfig(gen_length=16, steps=16, block_length=8, cache=cache, cfg_scale=cfg_scale)
  canvas = prompt_canvas([[1, 2], [3]], 16, mask_id=30, pad_id=31)
  copies = 2 if cfg_scale else 1
  memory = network.empty_memory(copies * rows, canvas.tokens.shape[1]) if cache.keeps else None
  state = start_state(canvas, row_keys(0, rows), mask_id=30, memory=memory)
  params = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
  jaxpr = jax.make_jaxpr(
    lambda params, state: decode_block(
      network, params, state, config=config, ids=Ids(mask=30, eos=(31,)), rest=0
    )
  )(params, state)
  names = set(within_loops(jaxpr.jaxpr))
  assert "dot_general" in names
  assert not names & {"cos", "sin"}


def test_prepared_positions_stand_for_positions():
  network, params = Denoiser(CONFIG), init_params(CONFIG, jax.random.key(0))
  tokens = jnp.arange(24).reshape(2, 12)
  positions = jnp.array([np.arange(12), np.arange(3, 15)])
  rest = {"segment_ids": jnp.ones_like(tokens), "at": jnp.array([0, 5]), "width": 4}

  def passes(positions):
    whole, memory = network.read(params, tokens, positions, keep=True, **rest)
    window = network.read_window(
      params, tokens, positions, memory=memory, start=rest["at"], size=4, **rest
    )
    return whole, window

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    passes(network.prepare(positions)), passes(positions),
  )  # fmt: skip
