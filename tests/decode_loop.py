"""The decoding loop described, to be compiled for devices that are not here."""

import flax.linen as nn
import jax

from lladax.infer import DualCache, SamplerConfig, Threshold
from lladax.infer.canvas import prompt_canvas
from lladax.infer.generate import row_keys
from lladax.infer.iteration import Ids
from lladax.infer.state import start_state
from lladax.models import Denoiser, init_variables

SAMPLER = SamplerConfig(
  gen_length=128, steps=128, block_length=64, cache=DualCache(), unmask=Threshold(0.9)
)


def arguments(config, rows: int, length: int, sharding) -> tuple[tuple, dict]:
  """Those of `decode_block`: a canvas [rows, length] and parameters, of which nothing is allocated."""

  def shaped(make):
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

  def state():
    canvas = prompt_canvas([[1]] * rows, length - 1, mask_id=0, pad_id=1, multiple=1)
    memory = Denoiser(config).empty_memory(rows, length)
    return start_state(canvas, row_keys(0, rows), mask_id=0, memory=memory)

  def params():
    return nn.meta.unbox(init_variables(config, jax.random.key(0))["params"])

  static = {"config": SAMPLER, "ids": Ids(mask=0, eos=(1,)), "rest": 0}
  return (Denoiser(config), shaped(params), shaped(state)), static


def memory_bytes(config, rows: int, length: int) -> int:
  """Of the keys and values, in bfloat16."""
  return 4 * config.num_hidden_layers * rows * length * config.kv_heads * config.head_size
