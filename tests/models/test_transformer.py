"""Laws of the whole network: who sees whom, what may change nothing, and where gradients go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.models import (
  AttentionMask,
  Transformer,
  block_causal,
  count_load,
  init_params,
  padding,
  segments,
  tiny,
)
from lladax.moe import MoEConfig, SigmoidBias
from lladax.types import RowGroups

V, L = 24, 12
MOE = MoEConfig(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=6)
CONFIG = tiny(
  vocab_size=V,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=2,
  moe=MOE,
  initializer_range=0.3,  # so that everything has an effect that can be seen
)


@functools.cache
def params_of(config):
  return jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, positions=None, mask=None):
  return Transformer(config).apply({"params": params}, tokens, positions=positions, mask=mask)


def logits_and_stats(config, tokens, positions=None, mask=None):
  return forward(config, params_of(config), tokens, positions, mask)


def logits(*args):
  return np.asarray(logits_and_stats(CONFIG, *args)[0])


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config, params, tokens, targets, weights):
  """((total, (nll, stats)), gradients), the routers' losses included."""

  def loss(params):
    total, nll, stats = Transformer(config).apply(
      {"params": params}, tokens, targets, weights, method="token_nll"
    )
    routers = 0 if stats is None else stats.balance_loss().mean() + stats.z_loss().mean()
    return total + routers, (nll, stats)

  return jax.value_and_grad(loss, has_aux=True)(params)


def random_tokens(seed=0, shape=(2, L)):
  return np.random.default_rng(seed).integers(2, V, size=shape).astype(np.int32)


def training_args(config=CONFIG):
  rng = np.random.default_rng(1)
  weights = rng.uniform(0.5, 2, size=(2, L)) * (rng.random((2, L)) < 0.6)
  return params_of(config), random_tokens(2), random_tokens(3), np.float32(weights)


def packed():
  """Two rows of documents A | B | padding, as tokens, positions and segment ids."""
  ids = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 3 + [2] * 9], np.int32)
  positions = np.array([[*range(5), *range(4), 0, 0, 0], [*range(3), *range(9)]], np.int32)
  return random_tokens(), positions, ids


def test_packing_leaks_nothing():
  tokens, positions, ids = packed()
  before = logits(tokens, positions, segments(ids))
  for document in (0, 1, 2):
    other = np.where(ids == document, random_tokens(9), tokens)
    after = logits(other, positions, segments(ids))
    np.testing.assert_array_equal(after[ids != document], before[ids != document])
    if (ids == document).any():
      assert np.abs(after - before)[ids == document].max() > 0.1


def test_packed_documents_equal_each_alone():
  tokens, positions, ids = packed()
  together = logits(tokens, positions, segments(ids))
  for row, document in [(0, 1), (0, 2), (1, 1), (1, 2)]:
    own = ids[row] == document
    alone = np.zeros((2, L), np.int32)
    alone[0, : own.sum()] = tokens[row, own]
    valid = np.zeros((2, L), np.int32)
    valid[0, : own.sum()] = 1
    got = logits(alone, POSITIONS, segments(valid))
    np.testing.assert_allclose(got[0, : own.sum()], together[row, own], rtol=1e-5, atol=1e-5)


POSITIONS = np.tile(np.arange(L, dtype=np.int32), (2, 1))


def test_everybody_sees_everybody_unless_told_otherwise():
  tokens = random_tokens()
  want = logits(tokens)
  for mask in (segments(np.ones((2, L), np.int32)), padding(np.ones((2, L), bool))):
    np.testing.assert_allclose(logits(tokens, POSITIONS, mask), want, rtol=1e-5, atol=1e-5)
  tokens[0, -1] = (tokens[0, -1] + 1) % V
  moved = np.abs(logits(tokens) - want).max(-1)
  assert (moved[0] > 1e-3).all() and (moved[1] == 0).all()  # the future too, no other row


def test_tokens_have_no_order_but_their_positions():
  tokens, positions, ids = packed()
  permutation = np.random.default_rng(5).permutation(L)
  want = logits(tokens, positions, segments(ids))[:, permutation]
  moved = (x[:, permutation] for x in (tokens, positions))
  got = logits(*moved, segments(ids[:, permutation]))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  still = logits(tokens[:, permutation], positions, segments(ids[:, permutation]))
  assert np.abs(still - want).max() > 0.1  # positions do matter


@pytest.mark.parametrize("ids", [None, packed()[2]], ids=["one", "packed"])
def test_later_blocks_do_not_reach_earlier_ones(ids):
  tokens, mask = random_tokens(), block_causal(4, ids)
  before = logits(tokens, None, mask)
  changed = tokens.copy()
  changed[:, 4:8] = random_tokens(9)[:, 4:8]
  after = logits(changed, None, mask)
  np.testing.assert_array_equal(after[:, :4], before[:, :4])
  moved = np.abs(after - before).max(-1)
  assert (moved[:, 4:8] > 1e-3).all()  # within the block in both directions
  assert (moved[1, 8:] > 1e-3).all()  # and what follows in the same document


@pytest.mark.parametrize("block_length", [0, -4])
def test_block_length_is_positive(block_length):
  with pytest.raises(ValueError, match=f"block_length.*got {block_length}"):
    block_causal(block_length)


def test_router_statistics_leave_padding_out():
  tokens, positions, ids = packed()
  valid = ids > 0
  mask = AttentionMask(segment_ids=ids)
  before = logits_and_stats(CONFIG, tokens, positions, mask)[1]
  after = logits_and_stats(CONFIG, np.where(valid, tokens, 5), positions, mask)[1]
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert before.load.shape == before.probability.shape == (2, 1, 4)
  assert before.entropy.shape == before.tokens.shape == (2, 1)
  assert before.balance_loss().shape == before.z_loss().shape == (2,)
  np.testing.assert_allclose(before.load.sum(-1), valid.sum(), rtol=1e-6)


def test_router_statistics_by_group_add_up_and_are_of_their_rows():
  tokens = random_tokens()
  rows = tokens.shape[0]
  groups = RowGroups(jnp.arange(rows) % 2, 3)
  params = params_of(CONFIG)
  by_group = Transformer(CONFIG).apply({"params": params}, tokens, groups=groups)[1]
  whole = logits_and_stats(CONFIG, tokens)[1]
  assert by_group.load.shape == (2, 3, 4) and not by_group.tokens[:, 2].any()
  for name in ("tokens", "load", "probability", "entropy", "z"):
    a, b = getattr(by_group, name), getattr(whole, name)
    np.testing.assert_allclose(a.sum(1), b.sum(1), rtol=1e-5)
    alone = getattr(logits_and_stats(CONFIG, tokens[1::2])[1], name)
    np.testing.assert_allclose(a[:, 1], alone[:, 0], rtol=1e-5)
  load = count_load(CONFIG, params, tokens, None, jnp.ones_like(tokens))
  np.testing.assert_allclose(load, whole.load[:, 0], rtol=1e-6)


def test_token_nll_equals_the_log_softmax():
  args = training_args()
  (total, (nll, stats)), _ = loss_and_gradients(CONFIG, *args)
  _, tokens, targets, weights = args
  out, want_stats = logits_and_stats(CONFIG, tokens)
  log_p = np.asarray(jax.nn.log_softmax(out))
  want = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(nll, np.where(weights != 0, want, 0), rtol=1e-5, atol=1e-5)
  routers = want_stats.balance_loss().mean() + want_stats.z_loss().mean()
  np.testing.assert_allclose(total, (weights * want).sum() + routers, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(want_stats), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [dict(remat="full", scan_unroll=7), dict(remat="dots"), dict(remat="keep_attention_and_routing")],
  ids=str,
)
def test_what_is_recomputed_changes_no_number(changes):
  want = loss_and_gradients(CONFIG, *training_args())
  got = loss_and_gradients(dataclasses.replace(CONFIG, **changes), *training_args())
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
def test_remat_keeps_what_its_name_says():
  wide = dataclasses.replace(MOE, num_experts=8, num_experts_per_tok=1)
  config = dataclasses.replace(CONFIG, moe=wide)
  args = training_args(config)

  def cost(remat):
    config_ = dataclasses.replace(config, remat=remat)
    compiled = loss_and_gradients.lower(config_, *args).compile().cost_analysis()
    text = str(jax.make_jaxpr(lambda *args: loss_and_gradients(config_, *args))(*args))
    return compiled["flops"], text.count(" = top_k["), text.count(" = exp ")

  # Operations of the compiled step; choices and exponentials of the traced one.
  none, nothing, attention, routing = map(
    cost, ("none", "keep_nothing", "keep_attention", "keep_routing")
  )
  assert nothing == cost("full")
  assert none[0] < attention[0] < nothing[0]
  # Neither the scores of attention nor the values they weight are computed again.
  rows, heads = args[1].shape[0], config.num_attention_heads
  assert nothing[0] - attention[0] > 2 * 2 * rows * heads * L * L * config.head_size
  assert (none[2], attention[2]) == (nothing[2] - 3, nothing[2] - 1)
  # Experts are chosen once, and not again backward.
  assert (none[1], nothing[1], routing[1]) == (1, 2, 1)


VARIANTS = {
  "llada_moe": {},
  "dense_tied_with_bias": dict(
    moe=None, intermediate_size=10, tie_word_embeddings=True, attention_bias=True, qk_norm=False
  ),
  "first_dense_shared_grouped_partial": dict(
    moe=dataclasses.replace(MOE, shared_expert_intermediate_size=5, num_experts_per_tok=4),
    first_k_dense=1,
    intermediate_size=10,
    num_key_value_heads=1,
    partial_rotary_factor=0.5,
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_has_a_gradient(changes):
  config = dataclasses.replace(CONFIG, **changes)
  (total, (_, stats)), gradients = loss_and_gradients(config, *training_args(config))
  assert np.isfinite(total)
  assert (stats is None) == (config.moe is None)
  if stats is not None:
    assert stats.load.shape == (config.num_routed_layers, 1, config.moe.num_experts)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert np.isfinite(leaf).all(), name
    layers = leaf if "layers" in name else leaf[None]
    for layer in layers:
      assert np.abs(layer).max() > 1e-4, name


def test_bfloat16_keeps_router_norms_and_logits_in_float32():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  tokens = random_tokens()
  out, stats = logits_and_stats(config, tokens)
  assert out.dtype == jnp.float32
  assert {leaf.dtype.name for leaf in jax.tree.leaves(stats)} == {"float32"}
  assert len(np.unique(np.asarray(out).view(np.uint32) & 0xFFFF)) > 100  # not rounded bfloat16
  want = logits(tokens)
  # Rounding may send a token to another expert; all but those stay near.
  close = np.abs(np.asarray(out) - want).max(-1) < 0.1 * np.abs(want).max()
  assert close.mean() > 0.7

  def primitives(jaxpr):
    for equation in jaxpr.eqns:
      yield equation
      for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          yield from primitives(inner)

  traced = jax.make_jaxpr(forward, static_argnums=0)(config, params_of(config), tokens)
  operands = {
    name: {
      str(e.invars[0].aval.dtype) for e in primitives(traced.jaxpr) if e.primitive.name == name
    }
    for name in ("rsqrt", "top_k", "exp", "dot_general")
  }
  assert operands["rsqrt"] == operands["top_k"] == operands["exp"] == {"float32"}
  assert operands["dot_general"] == {"bfloat16", "float32"}  # float32: the router alone


def test_a_causal_model_sees_no_later_token():
  config = dataclasses.replace(CONFIG, causal=True)
  tokens = random_tokens()
  before = np.asarray(logits_and_stats(config, tokens)[0])
  changed = tokens.copy()
  changed[:, 7] = (changed[:, 7] + 1) % V
  after = np.asarray(logits_and_stats(config, changed)[0])
  np.testing.assert_array_equal(after[:, :7], before[:, :7])
  assert (np.abs(after - before)[:, 7:].max((0, 2)) > 1e-3).all()


def test_a_shifted_model_predicts_from_the_state_before():
  shifted = dataclasses.replace(CONFIG, shift=True)
  tokens, positions, ids = packed()
  mask = segments(ids)
  plain = logits(tokens, positions, mask)
  got = np.asarray(forward(shifted, params_of(CONFIG), tokens, positions, mask)[0])
  want = np.where(positions[..., None] == 0, plain, np.roll(plain, 1, axis=1))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  # The first token of a document is not predicted from the document before it.
  assert positions[0, 5] == 0 and np.abs(plain[0, 5] - plain[0, 4]).max() > 0.1


def test_a_shifted_causal_model_never_sees_what_it_predicts():
  config = dataclasses.replace(CONFIG, causal=True, shift=True)
  tokens = random_tokens()
  before = np.asarray(logits_and_stats(config, tokens)[0])
  changed = tokens.copy()
  changed[:, 7] = (changed[:, 7] + 1) % V
  after = np.asarray(logits_and_stats(config, changed)[0])
  np.testing.assert_array_equal(after[:, :8], before[:, :8])
  assert np.abs(after - before)[:, 8].max() > 1e-3


def test_an_expert_bias_is_a_parameter_of_routers_that_have_one():
  router = SigmoidBias(n_group=2, topk_group=1)
  config = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, router=router))
  params = params_of(config)
  assert "expert_bias" not in params_of(CONFIG)["layers"]["moe"]
  bias = params["layers"]["moe"]["expert_bias"]
  assert bias.shape == (2, 4) and bias.dtype == jnp.float32 and not bias.any()
  moe = params["layers"]["moe"] | {"expert_bias": bias.at[:, 2:].set(10.0)}
  pushed = params | {"layers": params["layers"] | {"moe": moe}}
  load = forward(config, pushed, random_tokens())[1].load_share()
  np.testing.assert_allclose(load[:, 2:].sum(1), 1, rtol=1e-6)
