"""RMSNorm's casts, rotary embedding and per-head QK-norm, each against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lladax.models import abstract_params, full, tiny
from lladax.models.attention import Attention
from lladax.models.layers import Embedding, Projection, RMSNorm, rotary_tables, rotate

B, L, N, H = 2, 7, 3, 8
EPS = 1e-5


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_rms_norm_rounds_before_the_scale(jit):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 128)).astype(ml_dtypes.bfloat16)
  scale = rng.uniform(0.5, 2, size=128).astype(np.float32)
  norm = RMSNorm(EPS)
  run = jax.jit(norm.apply) if jit else norm.apply
  got = np.asarray(run({"params": {"scale": scale}}, jnp.asarray(x)))
  assert got.dtype == ml_dtypes.bfloat16

  high = x.astype(np.float32)
  high = high / np.sqrt(np.mean(high**2, axis=-1, keepdims=True) + np.float32(EPS))
  low_scale = scale.astype(ml_dtypes.bfloat16)
  want = high.astype(ml_dtypes.bfloat16) * low_scale  # NumPy rounds after each operation
  other = (high * low_scale.astype(np.float32)).astype(ml_dtypes.bfloat16)
  # rsqrt may differ in its last bit, which moves a rounding now and then.
  assert (got != want).mean() < 2e-3
  assert (other != want).mean() > 0.1


def test_rms_norm_computes_in_float32():
  x = jnp.full((1, 4096), 300.0, jnp.bfloat16)  # squares add up to 3.7e8: bfloat16 would stall
  got = RMSNorm(EPS).apply({"params": {"scale": jnp.ones(4096)}}, x)
  np.testing.assert_array_equal(got.astype(jnp.float32), 1)


def rotate_half_transcription(x, positions, size, theta):
  """x * cos + rotate_half(x) * sin with duplicated angles, float64; the rest is untouched."""
  x = np.asarray(x, np.float64)
  out = x.copy()
  for b in range(x.shape[0]):
    for i in range(x.shape[1]):
      frequencies = [theta ** (-2 * j / size) for j in range(size // 2)] * 2
      angle = positions[b, i] * np.array(frequencies)
      head = x[b, i, :, :size]
      half = np.concatenate([-head[:, size // 2 :], head[:, : size // 2]], axis=1)
      out[b, i, :, :size] = head * np.cos(angle) + half * np.sin(angle)
  return out


def heads(seed=0):
  return jax.random.normal(jax.random.key(seed), (B, L, N, H))


POSITIONS = np.array([np.arange(L), [3, 0, 900, 2, 2, 41, 7]], np.int32)


@pytest.mark.parametrize("size", [8, 4, 2])
def test_rotary_equals_the_rotate_half_transcription(size):
  cos, sin = rotary_tables(POSITIONS, size, 10_000.0, jnp.float32)
  assert cos.shape == sin.shape == (B, L, 1, size // 2)
  x = heads()
  got = rotate(x, cos, sin)
  want = rotate_half_transcription(x, POSITIONS, size, 10_000.0)
  np.testing.assert_allclose(got, want, atol=2e-4)  # float32 angles of up to 900
  np.testing.assert_array_equal(got[..., size:], x[..., size:])
  np.testing.assert_allclose(jnp.linalg.norm(got, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotary_tables_are_computed_in_float32_and_then_cast():
  positions = np.arange(8000, 8192, dtype=np.int32)[None]  # bfloat16 cannot tell them apart
  low = rotary_tables(positions, H, 5e4, jnp.bfloat16)
  for a, b in zip(low, rotary_tables(positions, H, 5e4, jnp.float32), strict=True):
    np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [8, 4])
def test_scores_depend_on_differences_of_positions_only(size):
  query, key = heads(1), heads(2)

  def scores(shift):
    tables = rotary_tables(POSITIONS % 50 + shift, size, 10_000.0, jnp.float32)
    return jnp.einsum("blnh,bsnh->bnls", rotate(query, *tables), rotate(key, *tables))

  np.testing.assert_allclose(scores(0), scores(37), atol=1e-4)
  plain = jnp.einsum("blnh,bsnh->bnls", query, key)
  assert jnp.abs(scores(0) - plain).max() > 0.1  # and it does something


def tables(config, positions):
  return rotary_tables(positions[None], config.rotary_size, config.rope_theta, jnp.float32)


def attention_of(config):
  """Params and apply of one attention layer on random input, queries and keys of some size."""
  x = jax.random.normal(jax.random.key(3), (1, 6, config.hidden_size))
  rotary, layer = tables(config, jnp.arange(6)), Attention(config)
  params = nn.meta.unbox(layer.init(jax.random.key(4), x, rotary, full())["params"])
  params = jax.tree.map(lambda p: 20 * p if p.ndim == 3 else p, params)
  apply = jax.jit(lambda params: layer.apply({"params": params}, x, rotary, full())[0])
  return params, apply


def small(**changes):
  return tiny(vocab_size=16, hidden_size=16, head_dim=H, num_attention_heads=2, **changes)


def test_qk_norm_is_per_head_with_one_scale_for_all_heads():
  shapes = jax.tree.map(lambda x: x.shape, abstract_params(small(num_key_value_heads=1)))
  attention = shapes["layers"]["attention"]
  assert attention["query_norm"]["scale"] == attention["key_norm"]["scale"] == (4, H)

  params, apply = attention_of(small())
  before = apply(params)
  # Scaling the queries of one head changes nothing: each head is normalised by itself.
  kernel = params["query"]["kernel"].at[:, 0].multiply(50.0)
  np.testing.assert_allclose(apply(params | {"query": {"kernel": kernel}}), before, atol=1e-4)
  # The scale multiplies: twice the query's is twice the key's.
  doubled = {name: {"scale": 2 * params[name]["scale"]} for name in ("query_norm", "key_norm")}
  by_query, by_key = (apply(params | {name: doubled[name]}) for name in doubled)
  np.testing.assert_allclose(by_query, by_key, atol=1e-4)
  assert np.abs(by_query - before).max() > 1e-2


def test_qk_norm_comes_before_rotary():
  params, apply = attention_of(small())
  # Unequal scales of a rotated pair: after rotary they would break the relative property.
  scale = jnp.array([3.0, 1, 1, 1, 0.2, 1, 1, 1])
  params |= {"query_norm": {"scale": scale}, "key_norm": {"scale": scale}}
  want = apply(params)
  x = jax.random.normal(jax.random.key(3), (1, 6, 16))
  rotary = tables(small(), jnp.arange(6) + 11)
  shifted, kept = Attention(small()).apply({"params": params}, x, rotary, full())
  assert kept is None
  np.testing.assert_allclose(shifted, want, atol=1e-4)


def test_without_qk_norm_there_is_no_scale():
  params, apply = attention_of(small(qk_norm=False))
  assert set(params) == {"query", "key", "value", "out"}
  kernel = params["query"]["kernel"].at[:, 0].multiply(5.0)
  assert np.abs(apply(params | {"query": {"kernel": kernel}}) - apply(params)).max() > 1e-2


def test_attention_equals_numpy_with_grouped_heads_and_bias():
  config = small(num_key_value_heads=1, attention_bias=True, qk_norm=False)
  params, apply = attention_of(config)
  bias = jax.random.normal(jax.random.key(5), (4, H))
  for name, rows in (("query", bias[:2]), ("key", bias[2:3]), ("value", bias[3:])):
    assert params[name]["bias"].shape == rows.shape
    params[name] = params[name] | {"bias": rows}
  assert set(params["out"]) == {"kernel"}
  x = np.asarray(jax.random.normal(jax.random.key(3), (1, 6, 16)), np.float64)
  q, k, v = (
    np.einsum("bld,dnh->blnh", x, params[name]["kernel"]) + params[name]["bias"]
    for name in ("query", "key", "value")
  )
  positions = np.arange(6)[None]
  q, k = (rotate_half_transcription(y, positions, H, config.rope_theta) for y in (q, k))
  scores = np.einsum("blnh,bsh->bnls", q, k[:, :, 0]) / np.sqrt(H)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = np.einsum("bnls,bsh->blnh", p, v[:, :, 0])
  want = np.einsum("blnh,nhd->bld", out, params["out"]["kernel"])
  np.testing.assert_allclose(apply(params), want, rtol=1e-4, atol=1e-4)


def test_projection_contracts_the_last_axes():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  layer = Projection((6,), ("heads", "head_dim", "embed"), inputs=2)
  params = nn.meta.unbox(layer.init(jax.random.key(1), x)["params"])
  assert params["kernel"].shape == (4, 5, 6)
  want = np.einsum("blnh,nhd->bld", x, params["kernel"])
  np.testing.assert_allclose(layer.apply({"params": params}, x), want, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_token_that_is_everywhere_is_summed_in_float32():
  """MASK is half of all tokens: in bfloat16 a sum of ones stops at 256."""
  layer = Embedding(4, 2, jnp.bfloat16)
  tokens = jnp.full((2, 2048), 3)
  params = nn.meta.unbox(layer.init(jax.random.key(0), tokens))
  grads = jax.grad(lambda params: layer.apply(params, tokens).astype(jnp.float32).sum())(params)
  np.testing.assert_array_equal(grads["params"]["embedding"][3], [4096, 4096])
