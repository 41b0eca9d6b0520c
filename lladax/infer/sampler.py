"""The decoding loop: block after block, each one jitted `while_loop` without a word to the host.

Every row writes its own next block. An iteration reads the network, draws a token for every masked
position of the block, writes those that the unmasking rule chooses and leaves the others masked
(LLaDA's semi-autoregressive decoding, arXiv 2502.09992). A row whose block is done waits for the
others and is not touched; rows may come and go between blocks. All that happens to a row is a
function of the row alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lladax.infer.config import SamplerConfig
from lladax.infer.iteration import Ids, Step
from lladax.infer.network import Network
from lladax.infer.state import State


@functools.partial(
  jax.jit, static_argnames=("network", "config", "ids", "rest"), donate_argnames="state"
)
def decode_block(
  network: Network, params: object, state: State, *, config: SamplerConfig, ids: Ids, rest: int
) -> State:
  """Writes every MASK in the next block of each row, and moves the rows on to the block after it.

  Args:
    network, params: see `Network`. Calls with equal static arguments and states of equal shape
      share one compilation.
    state: given away.
    config: how tokens are drawn and written.
    ids: of the model.
    rest: at least the columns from any row's block to its end, for a cache whose windows end there;
      see `window_rest`.
  """
  positions = network.prepare(state.positions)
  step = Step(network, params, config, ids, rest, positions)

  def busy(block):
    # A rule that keeps its contract is done by then. The bound is for one that does not: an endless
    # loop on a device cannot be interrupted.
    return jnp.any(step.reading(block)) & (block.iteration < step.bound)

  state = jax.lax.while_loop(busy, step.iterate, step.begin(state)).state
  if config.early_stop:
    state = step.stop_at_eos(state)
  return step.move_on(state)


def window_rest(config: SamplerConfig, columns: int) -> int:
  """`rest` for rows that end at most `columns` after their next block begins.

  A power of two of blocks, so that few lengths are compiled; 0 for a cache that does not ask.
  """
  width = config.block_length
  if config.cache.window(width, width) == config.cache.window(width, 2 * width):
    return 0
  blocks = -(-columns // width)
  return width << (blocks - 1).bit_length()
