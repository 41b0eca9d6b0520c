"""Laws of LoRA: nothing changes at first, merged is unmerged, only adapters learn, on every mesh."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.diffusion import Objective
from lladax.models import Transformer, init_params, tiny
from lladax.models import count_parameters as count_of
from lladax.moe import AllToAll, Fsdp, MoEConfig, Ring
from lladax.sharding import MeshConfig, make_mesh, param_shardings, use_mesh
from lladax.train import OptimizerConfig, Wsd, init_state, make_optimizer, state_shardings
from lladax.train.loop import place
from lladax.tune import (
  Adapted,
  LoraConfig,
  attach,
  init_adapters,
  load_adapters,
  make_lora_step,
  merge,
  save_adapters,
)
from lladax.types import Batch

MOE = MoEConfig(
  num_experts=4,
  num_experts_per_tok=2,
  expert_intermediate_size=16,
  shared_expert_intermediate_size=24,
)
MODEL = tiny(
  vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
  first_k_dense=1, moe=MOE, mask_token_id=63, eos_token_id=62, pad_token_id=62,
)  # fmt: skip
LORA = LoraConfig(rank=3, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(0, 60, (8, 16)).astype(np.int32)


@functools.cache
def base_params(model=MODEL):
  return jax.jit(functools.partial(init_params, model))(jax.random.key(0))


def adapters_of(lora=LORA, model=MODEL, *, scale=None):
  """Fresh ones, or with B drawn too."""
  adapters = nn.meta.unbox(init_adapters(model, lora, jax.random.key(1)))
  if scale is None:
    return adapters

  def draw(path, leaf):
    key = jax.random.fold_in(jax.random.key(2), len(jax.tree_util.keystr(path)))
    return scale * jax.random.normal(key, leaf.shape) if path[-1].key == "b" else leaf

  return jax.tree_util.tree_map_with_path(draw, adapters)


def logits(params, model=MODEL):
  return jax.jit(lambda p, t: Transformer(model).apply({"params": p}, t)[0])(params, TOKENS)


def paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_targets_and_shapes():
  shapes = {path: leaf.shape for path, leaf in paths(adapters_of()).items()}
  assert shapes["layers/attention/query/kernel/a"] == (2, 32, 3)
  assert shapes["layers/attention/query/kernel/b"] == (2, 3, 4, 8)
  assert shapes["layers/attention/out/kernel/a"] == (2, 4, 8, 3)
  assert shapes["layers/attention/out/kernel/b"] == (2, 3, 32)
  assert shapes["layers/moe/gate_up/a"] == (2, 4, 32, 3)
  assert shapes["layers/moe/gate_up/b"] == (2, 4, 3, 32)
  assert shapes["layers/moe/down/a"] == (2, 4, 16, 3)
  assert shapes["layers/shared_expert/down/kernel/a"] == (2, 24, 3)
  assert shapes["dense_layers/ffn/gate/kernel/b"] == (1, 3, 48)
  # Attention's four, gate_up and down, three of the shared expert; four and three of the dense layer.
  assert len(shapes) == 2 * (4 + 2 + 3 + 4 + 3)
  assert not [path for path in shapes if "router" in path or "norm" in path or "embed" in path]
  shared = paths(adapters_of(dataclasses.replace(LORA, share_experts=True)))
  assert shared["layers/moe/gate_up/a"].shape == (2, 32, 3)
  assert shared["layers/moe/gate_up/b"].shape == (2, 3, 32)


def test_nothing_changes_while_b_is_zero():
  base = base_params()
  attached = attach(MODEL, LORA, base, adapters_of())
  np.testing.assert_array_equal(logits(attached), logits(base))


@pytest.mark.parametrize(
  "share_experts, remat", [(False, "full"), pytest.param(True, "none", marks=pytest.mark.slow)]
)
def test_merged_is_unmerged(share_experts, remat):
  lora = dataclasses.replace(LORA, share_experts=share_experts)
  model = dataclasses.replace(MODEL, remat=remat)
  base, adapters = base_params(), adapters_of(lora, scale=0.05)
  unmerged = logits(attach(model, lora, base, adapters), model)
  np.testing.assert_allclose(unmerged, logits(merge(model, lora, base, adapters), model), atol=2e-6)
  assert np.abs(unmerged - logits(base, model)).max() > 1e-3


@pytest.mark.parametrize("share_experts", [False, True])
def test_merged_by_hand(share_experts):
  lora = dataclasses.replace(LORA, share_experts=share_experts)
  base, adapters = base_params(), adapters_of(lora, scale=0.05)
  merged = paths(merge(MODEL, lora, base, adapters))
  flat, given = paths(adapters), paths(base)
  assert merged.keys() == given.keys()
  for path, weight in given.items():
    if f"{path}/a" not in flat:
      np.testing.assert_array_equal(merged[path], weight)
      continue
    a, b = (np.asarray(flat[f"{path}/{name}"], np.float64) for name in "ab")
    for layer in range(weight.shape[0]):
      experts = range(weight.shape[1]) if "/moe/" in path else [...]
      for expert in experts:
        here = (layer,) if share_experts or expert is ... else (layer, expert)
        inputs = a[here].reshape(-1, 3)
        delta = 2.0 * inputs @ b[here].reshape(3, -1)
        expected = np.asarray(weight[layer][expert]) + delta.reshape(weight[layer][expert].shape)
        np.testing.assert_allclose(merged[path][layer][expert], expected, atol=1e-6)


def batch_of(tokens) -> Batch:
  shape = tokens.shape
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  ones = np.ones(shape, np.int32)
  return Batch(tokens=tokens, segment_ids=ones, positions=positions, maskable=ones > 0)


def train(model, mesh_config, *, steps=2, lora=LORA, **options):
  """(state, metrics of the last step, base) of a few steps."""
  mesh = make_mesh(mesh_config, jax.devices()[: int(np.prod(mesh_config.sizes))])
  config = OptimizerConfig(peak=1e-2, schedule=Wsd())
  optimizer = make_optimizer(config, 10)
  with use_mesh(mesh):
    boxed = jax.eval_shape(lambda: Transformer(model).init(jax.random.key(0), TOKENS))["params"]
    base = jax.device_put(base_params(model), param_shardings(mesh, boxed))
    before = jax.tree.map(np.asarray, base)
    state = init_state(lambda key: init_adapters(model, lora, key), optimizer, 1, mesh)
    step = make_lora_step(
      model, lora, Objective(), optimizer, seed=0, shardings=state_shardings(state), **options
    )
    for _ in range(steps):
      state, metrics = step(base, state, place(batch_of(TOKENS), mesh))
  jax.tree.map(np.testing.assert_array_equal, base, before)
  return state, metrics, base


@functools.cache
def on_one_device():
  return train(MODEL, MeshConfig(data=1))


@pytest.mark.slow
def test_only_adapters_learn():
  state, metrics, _ = on_one_device()
  fresh = paths(adapters_of())
  assert paths(state.params).keys() == fresh.keys()
  for path, leaf in paths(state.params).items():
    assert np.abs(leaf - fresh[path]).max() > 0, path
  # Moments too are of the adapters alone.
  sizes = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
  count = sum(leaf.size for leaf in fresh.values())
  assert sizes < 2.01 * count < 0.9 * 2 * count_of(MODEL).total
  assert float(metrics.means()["grad_norm"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes, exchange",
  [
    ({"data": 8}, Fsdp()),
    ({"data": 2, "fsdp": 2, "tensor": 2}, Fsdp()),
    ({"data": 2, "expert": 2, "context": 2}, Ring()),
    ({"data": 1, "expert": 4}, AllToAll()),
  ],
)
def test_sharded_is_unsharded(sizes, exchange):
  model = dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, exchange=exchange))
  alone, alone_metrics, _ = on_one_device()
  state, metrics, _ = train(model, MeshConfig(**sizes))
  np.testing.assert_allclose(metrics.means()["loss"], alone_metrics.means()["loss"], rtol=2e-5)
  for path, leaf in paths(state.params).items():
    expected = paths(alone.params)[path]
    # Adam divides by the root of the second moment: entries without gradient differ by rounding.
    close = np.isclose(leaf, expected, atol=2e-4)
    assert close.mean() > 0.99, path


def test_adapters_lie_on_the_mesh_like_their_weights():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  with use_mesh(mesh):
    optimizer = make_optimizer(OptimizerConfig(), 300)
    state = init_state(lambda key: init_adapters(MODEL, LORA, key), optimizer, 1, mesh)
  specs = {path: leaf.sharding.spec for path, leaf in paths(state.params).items()}
  assert specs["layers/attention/query/kernel/a"] == jax.P(None, "fsdp", None)
  assert specs["layers/attention/query/kernel/b"] == jax.P(None, None, "tensor", "expert")
  assert specs["layers/moe/down/a"] == jax.P(None, "tensor", "expert", None)


@pytest.mark.slow
def test_microbatches_give_the_same():
  one, _, _ = train(MODEL, MeshConfig(data=1), steps=1)
  four, _, _ = train(MODEL, MeshConfig(data=1), steps=1, microbatches=4)
  for path, leaf in paths(four.params).items():
    assert np.isclose(leaf, paths(one.params)[path], atol=2e-4).mean() > 0.99, path


def test_a_merge_in_bfloat16_says_what_it_rounds():
  base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base_params())
  merged = merge(MODEL, LORA, base, adapters_of(scale=0.05))
  assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
  attached = attach(MODEL, LORA, base, adapters_of(scale=0.05))
  (box,) = [attached["layers"]["moe"]["down"]]
  assert isinstance(box, Adapted) and box.unbox().dtype == jnp.float32


def test_adapters_are_saved_apart(tmp_path):
  adapters = adapters_of(scale=0.05)
  save_adapters(tmp_path / "a.safetensors", LORA, adapters)
  lora, loaded = load_adapters(tmp_path / "a.safetensors")
  assert lora == LORA
  jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
  from safetensors.numpy import save_file

  save_file({"x": np.zeros(1)}, tmp_path / "b.safetensors")
  with pytest.raises(ValueError, match="has no adapters of ours"):
    load_adapters(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"rank": 0}, "rank is at least 1"),
    ({"alpha": 0.0}, "alpha is positive"),
    ({"targets": ("(",)}, "is no regular expression"),
  ],
)
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    LoraConfig(**fields)


def test_targets_that_are_no_weights():
  for targets, message in [
    (("q_proj",), r"targets \['q_proj'\] are no weights .* layers/attention/query/kernel"),
    (("norm/scale",), "is no matrix"),
    ((), "are no weights"),
  ]:
    with pytest.raises(ValueError, match=message):
      init_adapters(MODEL, LoraConfig(targets=targets), jax.random.key(0))
  dense = tiny(vocab_size=64, moe=None, intermediate_size=32)
  assert init_adapters(dense, LoraConfig(), jax.random.key(0))
