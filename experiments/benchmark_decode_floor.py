"""What a pass of decoding needs at least: bytes that are read, products, and how fast they can be.

Weights are those of the pass: everything but the experts and the table of embeddings once, and of the
experts those that some token of the pass chose, counted on canvases of a real answer.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from lladax.models import Denoiser, ModelConfig, Transformer, segments
from lladax.models.attention import AttentionMask
from lladax.models.cache import Place, take_columns

FRAMES = 4  # canvases on which experts are counted


def floor(config: ModelConfig, params, sampler, result, prompt_length: int) -> dict:
  """Mean over the passes of the first row's answer, times the rows; B rows of equal prompts.

  Args:
    params: of `config`, unstacked.
    sampler: the `SamplerConfig` that the answer was decoded with.
    result: its `GenerateResult`.
    prompt_length: of the first row.

  Returns:
    "bytes" and "flops" of a pass, and "experts", how many of each layer's are read.
  """
  rows = len(result.tokens)
  passes = list(_passes(sampler, result, prompt_length))
  counted = [passes[i] for i in np.linspace(0, len(passes) - 1, FRAMES).astype(int)]
  frames, segment_ids = result.frames(0), jnp.ones((1, len(result.row(0))), jnp.int32)
  found = {}
  for iteration, start, size in counted:
    tokens = jnp.asarray(frames[min(iteration, len(frames) - 1)][None])
    chosen = _experts_read(config, params, tokens, segment_ids, jnp.array([start]), size)
    found.setdefault(size, []).append(float(chosen))
  experts = {size: float(np.mean(numbers)) for size, numbers in found.items()}
  length = segment_ids.shape[1]
  costs = []
  for _, _, size in passes:
    read = experts.get(size, next(iter(experts.values())))
    costs.append((*_cost(config, params, rows, size, length, sampler.block_length, read), read))
  return dict(zip(("bytes", "flops", "experts"), np.mean(costs, axis=0).tolist(), strict=True))


def _passes(sampler, result, prompt_length: int):
  """(iteration of the row, first column, columns) of every pass of the first row."""
  length, width = len(result.row(0)), sampler.block_length
  when = result.revealed_at[0][result.is_text[0]]
  iteration = 0
  for block in range(sampler.num_blocks):
    start = prompt_length + block * width
    last = int(when[start : start + width].max(initial=iteration - 1))
    for in_block in range(last - iteration + 1):
      at = jnp.int32(in_block), jnp.array([iteration + in_block])
      if bool(sampler.cache.whole(*at)[0]):
        yield iteration + in_block, 0, length
      else:
        before, size = sampler.cache.window(width, length - start)
        first = min(max(start - before, 0), length - min(size, length))
        yield iteration + in_block, first, min(size, length)
    iteration = max(iteration, last + 1)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _experts_read(config, params, tokens, segment_ids, start, size):
  """float32[], the mean over layers of the experts that some of these columns chose."""
  positions = jnp.arange(tokens.shape[1])[None]
  at = jnp.zeros(1, jnp.int32)
  _, memory = Denoiser(config).read(
    params, tokens, positions, segment_ids, at=at, width=1, keep=True
  )
  own = segments(take_columns(segment_ids, start, size))

  def load(module, tokens, positions):
    mask = AttentionMask(segment_ids=own.segment_ids, key_segment_ids=segment_ids)
    place = Place(start)
    return module._hidden(tokens, positions=positions, mask=mask, memory=memory, place=place)[1]

  columns = (take_columns(x, start, size) for x in (tokens, positions))
  stats = Transformer(config).apply({"params": params}, *columns, method=load)
  return (stats.load.sum(-2) > 0).sum(-1).mean()


def _cost(config: ModelConfig, params, rows, size, length, width, experts) -> tuple[float, float]:
  """Bytes and FLOPs of one pass over `size` columns of each row, logits of `width`."""
  n, D, moe = config.num_hidden_layers, config.hidden_size, config.moe
  sizes = jax.tree_util.tree_leaves_with_path(params)
  named = [(jax.tree_util.keystr(path), leaf) for path, leaf in sizes]
  routed = "['moe']['gate_up']", "['moe']['down']"
  of_experts = sum(leaf.nbytes for name, leaf in named if any(part in name for part in routed))
  table = sum(leaf.nbytes for name, leaf in named if "embedding" in name)
  others = sum(leaf.nbytes for _, leaf in named) - of_experts - table
  item, tokens = jnp.dtype(config.dtype).itemsize, rows * size
  cached = 2 * rows * length * config.kv_heads * config.head_size * n * item
  table = table if config.tie_word_embeddings else tokens * D * item
  read = others + of_experts * experts / moe.num_experts + table + cached

  heads = config.num_attention_heads * config.head_size
  products = D * heads * 2 + D * config.kv_heads * config.head_size * 2
  products += 3 * D * moe.expert_intermediate_size * moe.num_experts_per_tok
  products += D * moe.num_experts + 3 * D * (moe.shared_expert_intermediate_size or 0)
  flops = 2 * products * n * tokens + 4 * heads * length * n * tokens
  return float(read), float(flops + 2 * D * config.vocab_size * rows * width)


def ceilings(dtype: str) -> dict[str, float]:
  """ "bytes" per second of a copy, read and written, and "flops" per second of a product."""
  accelerator = jax.default_backend() != "cpu"
  side, numbers = (8192, 1 << 28) if accelerator else (2048, 1 << 25)
  square = jnp.ones((side, side), dtype)
  vector = jnp.ones((numbers // 128, 128), jnp.float32)
  product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
  copy = jax.jit(lambda x: -x)
  return {
    "flops": 2.0 * side**3 / _seconds(product, square),
    "bytes": 2.0 * vector.nbytes / _seconds(copy, vector),
  }


def _seconds(function, x) -> float:
  """The least of a few calls: a ceiling is what the device can do."""
  function(x).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    function(x).block_until_ready()
    times.append(time.perf_counter() - start)
  return min(times)
