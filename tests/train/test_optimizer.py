"""Laws of the optimizer: what decays, what Muon does to which matrices, biases and averages."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lladax.models import init_params, init_variables, tiny
from lladax.moe import MoEConfig, TopKSoftmax
from lladax.train.expert_bias import BiasUpdate
from lladax.train.optimizer import (
  AdamW,
  Muon,
  OptimizerConfig,
  decay_mask,
  ema_params,
  make_optimizer,
)
from lladax.train.schedules import Constant, Wsd

PARAMS = {
  "layers": {
    "norm": {"scale": jnp.ones((3, 4))},
    "mlp": {"kernel": jnp.ones((3, 4, 4))},
    "moe": {"expert_bias": jnp.ones((3, 4))},
  },
  "head": {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))},
}


def test_norms_and_biases_do_not_decay_even_when_scanned():
  mask = decay_mask(PARAMS)
  assert mask == {
    "layers": {
      "norm": {"scale": False},
      "mlp": {"kernel": True},
      "moe": {"expert_bias": False},
    },
    "head": {"bias": False, "kernel": True},
  }
  boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), PARAMS)
  assert decay_mask(boxed) == mask
  # Everything decays in OLMoE: everything that has a gradient.
  everything = jax.tree.leaves(decay_mask(PARAMS, ()))
  assert len(everything) == 5 and sum(everything) == 4
  assert not decay_mask(PARAMS, ("mlp",))["layers"]["mlp"]["kernel"]


def test_the_decay_reaches_the_update():
  config = OptimizerConfig(peak=0.1, schedule=Constant(), weight_decay=0.5)
  optimizer = make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates["head"]["kernel"], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0.0)


def test_clipping_makes_the_update_blind_to_the_size_of_the_gradient():
  # eps far above the clipped moments, so that the update is proportional to the gradient.
  config = OptimizerConfig(
    peak=1.0, schedule=Constant(), rule=AdamW(eps=1e3), weight_decay=0.0, clip=1.0
  )
  optimizer = make_optimizer(config, 10)

  def update(scale):
    grads = jax.tree.map(lambda x: scale * x, PARAMS)
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]["head"]["kernel"]

  np.testing.assert_allclose(update(100.0), update(1.0), rtol=1e-4)
  assert np.abs(update(1e-3)).max() < 0.1 * np.abs(update(1.0)).max()


# --- Muon ---

MODEL = tiny(
  vocab_size=32,
  hidden_size=8,
  num_hidden_layers=3,
  num_attention_heads=2,
  first_k_dense=1,
  intermediate_size=12,
  moe=MoEConfig(
    num_experts=4,
    num_experts_per_tok=2,
    expert_intermediate_size=6,
    shared_expert_intermediate_size=10,
    router=TopKSoftmax(expert_bias=True),
  ),
)


@functools.cache
def _fresh():
  return jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))


def fresh_params():
  return jax.tree.map(lambda x: x, _fresh())  # dicts of its own


def random_like(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def updates(config, grads, params):
  """The last of the updates of these gradients, one step each, by name."""
  optimizer = make_optimizer(config, 10)
  state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
  loads = jnp.full((2, 4), 0.25)
  for gradient in grads:
    new, state = update(gradient, state, params, load_share=loads)
  return by_name(new), state


def newton_schulz(x, steps=5):
  """Jordan's quintic, in float64 on one D x F matrix."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = x / (np.linalg.norm(x) + 1e-8)
  flat = x.shape[0] <= x.shape[1]
  x = x if flat else x.T
  for _ in range(steps):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x if flat else x.T


def muon_by_hand(grads, matrices, join, *, beta=0.95, rms=0.2):
  """The update direction after the last gradient; `matrices` cuts a parameter into its own."""
  momentum = np.zeros(np.shape(grads[0]))
  for count, gradient in enumerate(np.asarray(grads, np.float64), start=1):
    momentum = beta * momentum + (1 - beta) * gradient
    ahead = beta * momentum / (1 - beta ** (count + 1))
    ahead += (1 - beta) * gradient / (1 - beta**count)
  return join([rms * np.sqrt(max(m.shape)) * newton_schulz(m) for m in matrices(ahead)])


def test_muon_orthogonalises_each_matrix_of_each_layer_and_expert():
  params = fresh_params()
  grads = [random_like(params, seed) for seed in range(2)]
  config = OptimizerConfig(peak=1.0, schedule=Constant(), rule=Muon(), weight_decay=0.0, clip=None)
  got, _ = updates(config, grads, params)
  grads = [by_name(gradient) for gradient in grads]
  n, N, H, E, D, F = 2, 2, 4, 4, 8, 6
  stack = {  # name -> (its matrices, and back)
    "layers/moe/down": (
      lambda x: x.reshape(n * E, F, D),
      lambda ms: np.reshape(ms, (n, E, F, D)),
    ),
    "layers/moe/gate_up": (
      lambda x: [m for e in x.reshape(n * E, D, 2 * F) for m in np.split(e, 2, axis=1)],
      lambda ms: np.concatenate([ms[::2], ms[1::2]], axis=-1).reshape(n, E, D, 2 * F),
    ),
    "layers/attention/query/kernel": (
      lambda x: x.reshape(n, D, N * H),
      lambda ms: np.reshape(ms, (n, D, N, H)),
    ),
    "layers/attention/out/kernel": (
      lambda x: x.reshape(n, N * H, D),
      lambda ms: np.reshape(ms, (n, N, H, D)),
    ),
    "layers/shared_expert/down/kernel": (lambda x: x, np.stack),
    "dense_layers/ffn/up/kernel": (lambda x: x, np.stack),
  }
  for name, (cut, join) in stack.items():
    want = -muon_by_hand([gradient[name] for gradient in grads], cut, join)
    np.testing.assert_allclose(got[name], want, rtol=2e-3, atol=2e-4, err_msg=name)
    assert np.sqrt(np.mean(np.square(want))) == pytest.approx(0.2, rel=0.3), name


def test_everything_else_is_adamws():
  params = fresh_params()
  grads = [random_like(params, seed) for seed in range(2)]
  config = OptimizerConfig(peak=0.1, schedule=Constant(), clip=None)
  muon, state = updates(dataclasses.replace(config, rule=Muon()), grads, params)
  adamw, _ = updates(config, grads, params)
  same = {name for name in adamw if np.array_equal(adamw[name], muon[name])}
  kinds = {"embedding", "router", "scale", "expert_bias"}
  assert same == {name for name in adamw if name.split("/")[-1] in kinds or "lm_head" in name}
  assert len(adamw) - len(same) == 2 * 4 + 3 + 3 + 2  # attention, shared, dense, experts
  # One moment for a matrix, two for the rest.
  moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)
  size = {name: x.size for name, x in by_name(params).items() if x.ndim > 1}
  others = sum(size[name] for name in same & set(size) if "expert_bias" not in name)
  matrices = sum(size.values()) - others - size["layers/moe/expert_bias"]
  assert moments == matrices + 2 * others


@pytest.mark.parametrize("rule", [AdamW(), Muon()], ids=repr)
def test_the_state_of_boxed_parameters_is_that_of_plain_ones(rule):
  config = OptimizerConfig(rule=rule, ema=0.99, bias_update=BiasUpdate())
  optimizer = make_optimizer(config, 10)
  boxed = jax.eval_shape(
    lambda: nn.meta.unbox(optimizer.init(init_variables(MODEL, jax.random.key(0))["params"]))
  )
  plain = jax.eval_shape(lambda: optimizer.init(init_params(MODEL, jax.random.key(0))))
  assert jax.tree.structure(boxed) == jax.tree.structure(plain)
  assert [x.shape for x in jax.tree.leaves(boxed)] == [x.shape for x in jax.tree.leaves(plain)]


def test_a_next_stage_may_clip_or_take_another_schedule():
  params = fresh_params()
  one, other = (
    jax.eval_shape(make_optimizer(OptimizerConfig(clip=clip, schedule=schedule), 10).init, params)
    for clip, schedule in ((1.0, Constant(warmup=2)), (None, Wsd()))
  )
  assert jax.tree.structure(one) == jax.tree.structure(other)


# --- Expert biases ---


def test_biases_follow_the_load_as_ling_has_it():
  rng = np.random.default_rng(0)
  bias, load = rng.normal(size=(2, 4)), rng.dirichlet(np.ones(4), size=2)
  load[1] = 0.25  # balanced: nothing moves
  want = bias.copy()
  for layer in range(2):
    signs = []
    for expert in range(4):
      lack = load[layer].mean() - load[layer, expert]
      signs.append((lack > 0) * 1.0 - (lack < 0) * 1.0)
    for expert in range(4):
      want[layer, expert] += 1e-3 * (signs[expert] - np.mean(signs))
  got = bias + BiasUpdate(rate=1e-3)(jnp.float32(bias), jnp.float32(load))
  np.testing.assert_allclose(got, want, atol=1e-7)
  assert np.abs(want - bias)[0].max() > 5e-4
  np.testing.assert_allclose((want - bias).sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("rule", [AdamW(), Muon()], ids=repr)
@pytest.mark.parametrize("update", [None, BiasUpdate(rate=0.01)], ids=repr)
def test_biases_have_no_gradient_no_moments_and_no_decay(rule, update):
  params = fresh_params()
  params["layers"]["moe"]["expert_bias"] += 1.0
  gradient = random_like(params, 0)  # even if there were one
  config = OptimizerConfig(rule=rule, not_decayed=(), bias_update=update, peak=0.5)
  optimizer = make_optimizer(config, 10)
  state = jax.jit(optimizer.init)(params)
  assert not [name for name in by_name(state) if "expert_bias" in name]
  load = jnp.float32([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
  new, _ = jax.jit(optimizer.update)(gradient, state, params, load_share=load)
  step = new["layers"]["moe"]["expert_bias"]
  want = np.zeros((2, 4))
  if update is not None:
    want[0] = 0.01 * (np.array([-1, 1, 1, 1]) - 0.5)
  np.testing.assert_allclose(step, want, atol=1e-8)


def test_a_bias_update_without_a_load_says_so():
  params = fresh_params()
  optimizer = make_optimizer(OptimizerConfig(bias_update=BiasUpdate()), 10)
  with pytest.raises(ValueError, match="the loss reports none"):
    jax.eval_shape(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)


# --- The running average ---


def test_the_average_is_that_of_the_parameters_after_each_update():
  params = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
  optimizer = make_optimizer(OptimizerConfig(peak=0.1, ema=0.3), 30)
  state = optimizer.init(params)
  want = np.ones((2, 3))
  for step in range(1, 13):
    gradient = {"kernel": jnp.bfloat16(np.random.default_rng(step).normal(size=(2, 3)))}
    new, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, new)
    rate = min(0.3, (1 + step) / (10 + step))
    want = rate * want + (1 - rate) * np.asarray(params["kernel"], np.float64)
  average = ema_params(state)["kernel"]
  assert average.dtype == jnp.float32 and params["kernel"].dtype == jnp.bfloat16
  np.testing.assert_allclose(average, want, rtol=1e-5)
  with pytest.raises(ValueError, match="optimizer.ema"):
    ema_params(make_optimizer(OptimizerConfig(), 10).init(params))
