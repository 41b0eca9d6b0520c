"""The transformer: embedding, scanned layers, final norm, head. Position i predicts token i.

No time embedding and no causal mask: LLaDA-MoE reads the noise level off the MASK tokens
(arXiv 2509.24389). Predictions are made for every position at once.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lladax.models.attention import Attention, AttentionMask, full, segments
from lladax.models.cache import Columns, KeyValues, Memory, Place, take_columns
from lladax.models.config import ModelConfig, dtype_of
from lladax.models.head import weighted_nll_on_mesh
from lladax.models.layers import Embedding, RMSNorm, RotaryPositions, SwiGLU, project, rotary_tables
from lladax.moe.layer import MoELayer
from lladax.moe.router import RouterStats
from lladax.sharding import constrain, spec
from lladax.types import Logits, PerToken, Positions, RowGroups, Scalar, TokenNll, Tokens

_keep = jax.checkpoint_policies.save_only_these_names

REMAT = {
  "keep_nothing": jax.checkpoint_policies.nothing_saveable,
  "keep_dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "keep_attention": _keep("attention"),
  "keep_routing": _keep("routing"),
  "keep_attention_and_routing": _keep("attention", "routing"),
}
REMAT |= {"full": REMAT["keep_nothing"], "dots": REMAT["keep_dots"]}


class Layer(nn.Module):
  """x + attention(norm x), then x + ffn(norm x).

  Returns x, of the `wanted` columns alone if given, and as a pair the RouterStats where routed and the
  keys and values where they are asked for by a `place`.
  """

  config: ModelConfig
  routed: bool

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    memory: KeyValues | None,
    rotary: tuple,
    mask: AttentionMask,
    groups: RowGroups | None,
    place: Place | None,
    wanted: Columns | None = None,
  ):
    config = self.config
    shared = {
      "initializer_range": config.initializer_range,
      "param_dtype": dtype_of(config.param_dtype),
    }
    norm = functools.partial(RMSNorm, config.rms_norm_eps)
    y = norm(name="attention_norm")(x)
    y, kept = Attention(config, name="attention")(y, rotary, mask, memory, place, wanted)
    if wanted is not None:
      x, mask = wanted.take(x), mask.asked_by(wanted)
    x = x + y
    x = constrain(x, "batch", "length", "activation")  # [B, L, D]
    y = norm(name="ffn_norm")(x)
    if self.routed:
      routed, stats = MoELayer(config.moe, name="moe", **shared)(y, mask.valid(), groups)
      width = config.moe.shared_expert_intermediate_size
      if width is not None:
        routed = routed + SwiGLU(width, name="shared_expert", **shared)(y)
      x = x + routed
    else:
      x, stats = x + SwiGLU(config.intermediate_size, name="ffn", **shared)(y), None
    return constrain(x, "batch", "length", "activation"), (stats, kept)


class Unstacked(nn.Module):
  """The layers one by one, each with parameters of its own; called as a scanned `Layer` is.

  Of the last one only the `wanted` columns are computed.
  """

  config: ModelConfig
  routed: bool
  length: int

  @nn.compact
  def __call__(self, x: jax.Array, memory: tuple | None, *rest, wanted: Columns | None = None):
    stats, kept = [], []
    for n in range(self.length):
      own = None if memory is None else memory[n]
      of_last = wanted if n == self.length - 1 else None
      layer = Layer(self.config, self.routed, name=f"layer_{n}")
      x, (of_layer, kept_of_layer) = layer(x, own, *rest, of_last)
      stats.append(of_layer)
      kept.append(kept_of_layer)
    return x, (jax.tree.map(lambda *each: jnp.stack(each), *stats), tuple(kept))


class Transformer(nn.Module):
  """Tokens to logits, or to the weighted negative log-likelihood of targets.

  Methods take noisy tokens int32[B, L]; `positions` default to 0 .. L-1, `mask` to full attention
  and `groups`, by which the routers' statistics are summed, to one group of all rows.
  """

  config: ModelConfig

  def setup(self):
    config = self.config
    param_dtype = dtype_of(config.param_dtype)
    self.embed = Embedding(
      config.vocab_size,
      config.hidden_size,
      dtype_of(config.dtype),
      config.initializer_range,
      param_dtype,
    )
    if config.num_dense_layers:
      self.dense_layers = self._stack(routed=False, length=config.num_dense_layers)
    if config.num_routed_layers:
      self.layers = self._stack(routed=True, length=config.num_routed_layers)
    self.final_norm = RMSNorm(config.rms_norm_eps)
    if not config.tie_word_embeddings:
      self.lm_head = _Head(config)

  def _stack(self, *, routed: bool, length: int):
    if not self.config.stacked:
      return Unstacked(self.config, routed, length)
    layer = Layer
    if self.config.remat != "none":
      layer = nn.remat(layer, policy=REMAT[self.config.remat], prevent_cse=False)
    return nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
      length=length,
      unroll=min(self.config.scan_unroll, length),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(self.config, routed)

  def __call__(
    self,
    tokens: Tokens,
    *,
    positions: Positions | None = None,
    mask: AttentionMask | None = None,
    groups: RowGroups | None = None,
  ) -> tuple[Logits, RouterStats | None]:
    """float32 logits [B, L, V] and the routers' statistics, stacked over routed layers [n, ...]."""
    hidden, stats = self.hidden(tokens, positions=positions, mask=mask, groups=groups)
    kernel, axes = self._head()
    return project(hidden, kernel, axes, dtype=jnp.float32), stats

  def token_nll(
    self,
    tokens: Tokens,
    targets: Tokens,
    weights: PerToken,
    *,
    positions: Positions | None = None,
    mask: AttentionMask | None = None,
    groups: RowGroups | None = None,
  ) -> tuple[Scalar, PerToken, RouterStats | None]:
    """sum of weights * nll, the nll itself (0 where the weight is) and the routers' statistics.

    The head is computed for weighted positions only; see `lladax.models.head`.
    """
    hidden, stats = self.hidden(tokens, positions=positions, mask=mask, groups=groups)
    total, nll = weighted_nll_on_mesh(hidden, *self._head(), targets, weights)
    return total, nll, stats

  def hidden(
    self,
    tokens: Tokens,
    *,
    positions: Positions | None = None,
    mask: AttentionMask | None = None,
    groups: RowGroups | None = None,
  ) -> tuple[jax.Array, RouterStats | None]:
    """Final hidden states [B, L, D], after the last norm: the one at i predicts token i."""
    return self._hidden(tokens, positions=positions, mask=mask, groups=groups)[:2]

  def _hidden(
    self,
    tokens: Tokens,
    *,
    positions: Positions | RotaryPositions | None,
    mask: AttentionMask | None,
    groups: RowGroups | None = None,
    soft: jax.Array | None = None,
    memory: Memory | None = None,
    place: Place | None = None,
    wanted: Columns | None = None,
  ) -> tuple[jax.Array, RouterStats | None, Memory | None]:
    """As `hidden`, of the `wanted` columns; `soft` [B, L, D] is added to the embedding; the keys and
    values of a `place`."""
    config = self.config
    mask = full() if mask is None else mask
    if config.causal:
      mask = dataclasses.replace(mask, block_length=1)
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = self.embed(tokens)  # [B, L, D]
    if soft is not None:
      x = x + soft.astype(x.dtype)
    x = constrain(x, "batch", "length", "activation")
    if not isinstance(positions, RotaryPositions):
      positions = rotary_positions(config, positions)
    positions, rotary = positions.positions, positions.rotary
    memory = Memory(None, None) if memory is None else memory
    stats = kept = dense_kept = None
    last = {}
    if wanted is not None:
      positions = wanted.take(positions)
      if _may_leave_out(config, x):
        last = {"wanted": wanted}
    if config.num_dense_layers:
      more = {} if config.num_routed_layers else last
      args = memory.dense_layers, rotary, mask, None, place
      x, (_, dense_kept) = self.dense_layers(x, *args, **more)
    if config.num_routed_layers:
      x, (stats, kept) = self.layers(x, memory.layers, rotary, mask, groups, place, **last)
    if wanted is not None and not last:
      x = wanted.take(x)
    x = self.final_norm(x)
    if config.shift:
      before = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
      x = jnp.where((positions == 0)[..., None], x, before)
    return x, stats, None if place is None else Memory(dense_kept, kept)

  def read(
    self,
    tokens: Tokens,
    *,
    positions: Positions | RotaryPositions,
    mask: AttentionMask,
    at: jax.Array,
    width: int,
    soft: jax.Array | None = None,
    memory: Memory | None = None,
    place: Place | None = None,
  ) -> tuple[Logits, Memory | None]:
    """float32 logits [B, width, V] of a few columns, and keys and values: a step of decoding.

    Args:
      tokens, positions, mask: of the columns of this pass, [B, L].
      at: int32[B], the first column of the logits, counted within this pass.
      soft: [B, L, D], added to the embeddings.
      memory: keys and values of the whole canvas; None: the pass is over the whole of it.
      place: where the pass lies in the canvas; None where no keys and values are wanted.

    Returns:
      The logits, and the keys and values of the columns of this pass where there is a `place`.

    Raises:
      ValueError: for a causal model, which cannot see what follows.
    """
    if self.config.causal:
      raise ValueError("a causal model predicts from what is before; it cannot denoise a canvas")
    # A column's logits may be those of the hidden state before it.
    shift = int(self.config.shift)
    start = jnp.maximum(at - shift, 0)
    wanted = Columns(start, min(width + shift, tokens.shape[1]))
    hidden, _, kept = self._hidden(
      tokens, positions=positions, mask=mask, soft=soft, memory=memory, place=place, wanted=wanted
    )
    kernel, axes = self._head()
    hidden = take_columns(hidden, at - start, width)
    return project(hidden, kernel, axes, dtype=jnp.float32), kept

  def embed_softly(self, probabilities: jax.Array) -> jax.Array:
    """float32[B, W, V] -> [B, W, D]: the mean embedding under distributions over tokens."""
    table = self.embed.embedding
    return project(probabilities.astype(dtype_of(self.config.dtype)), table, Embedding.AXES)

  def _head(self) -> tuple[jax.Array, tuple[str, str]]:
    """The kernel [D, V] and the logical names of its axes."""
    if self.config.tie_word_embeddings:
      return self.embed.embedding.T, Embedding.AXES[::-1]
    return self.lm_head(), _Head.AXES


def rotary_positions(config: ModelConfig, positions: Positions) -> RotaryPositions:
  """Positions with the tables by which queries and keys turn there.

  Once for all layers, and for all passes of a loop that can have them made before it: from the
  positions alone XLA takes the cosine anew in each layer for every head.
  """
  dtype = dtype_of(config.dtype)
  tables = rotary_tables(positions, config.rotary_size, config.rope_theta, dtype)
  return RotaryPositions(positions, tables)


def _may_leave_out(config: ModelConfig, x: jax.Array) -> bool:
  """Whether the last layer can compute some columns of x [B, L, D] only."""
  return not config.stacked and spec(x.shape[:2], "batch", "length")[1] is None


class _Head(nn.Module):
  config: ModelConfig

  AXES = ("embed", "vocab")

  @nn.compact
  def __call__(self) -> jax.Array:
    config = self.config
    init = nn.initializers.normal(config.initializer_range)
    init = nn.with_logical_partitioning(init, self.AXES)
    shape = (config.hidden_size, config.vocab_size)
    return self.param("kernel", init, shape, dtype_of(config.param_dtype))


def bind_token_nll(
  config: ModelConfig, params, positions, segment_ids, groups: RowGroups | None = None
) -> TokenNll:
  """The network as an objective calls it, for rows of these positions and segments.

  `groups`: by which the routers' statistics, its aux, are summed.
  """

  def token_nll(tokens, targets, weights):
    return Transformer(config).apply(
      {"params": params},
      tokens,
      targets,
      weights,
      positions=positions,
      mask=segments(segment_ids),
      groups=groups,
      method="token_nll",
    )

  return token_nll


def count_load(config: ModelConfig, params, tokens: Tokens, positions, segment_ids) -> jax.Array:
  """float32[n, E]: `RouterStats.load` of these rows, all of them one group. No head is computed."""
  _, stats = Transformer(config).apply(
    {"params": params}, tokens, positions=positions, mask=segments(segment_ids), method="hidden"
  )
  return stats.load.sum(-2)


def init_variables(config: ModelConfig, key: jax.Array, shape: tuple[int, int] = (1, 2)):
  """Boxed Linen variables (each parameter carries its logical axis names).

  They do not depend on `shape`, of the tokens [B, L] that pass through the network for it.
  """
  return Transformer(config).init(key, jnp.zeros(shape, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array):
  """Fresh parameters as a plain tree: normal(0, initializer_range), ones for norms."""
  return nn.meta.unbox(init_variables(config, key)["params"])


def abstract_params(config: ModelConfig, shape: tuple[int, int] = (1, 2)):
  """Shapes and dtypes of the parameters, nothing allocated.

  Raises:
    ValueError: within `use_mesh`, if tokens [B, L] of this shape cannot pass through the network on
      the mesh: its heads or experts do not divide.
  """
  key = jax.random.key(0)
  return jax.eval_shape(lambda: nn.meta.unbox(init_variables(config, key, shape)["params"]))
