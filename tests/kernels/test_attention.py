"""Every implementation of attention against softmax attention written out in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import IMPLEMENTATIONS, attention, row_blocks

RUNNABLE = [name for name in IMPLEMENTATIONS if name != "cudnn"]  # splash is interpreted

B, L, N, H = 6, 12, 4, 8


def operands(kv_heads=N, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (N, kv_heads, kv_heads, N)
  return [jax.random.normal(key, (B, L, n, H), dtype) for key, n in zip(keys, heads, strict=True)]


def packed_rows():
  """Two documents and padding of different lengths; the last row is padding alone."""
  rows = [[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [1] * 1 + [2] * 11, [0] * 4 + [1] * 8]
  return np.array([*rows, [1, 2, 3] + [4] * 9, [0] * 12], np.int32)


def softmax_attention(query, key, value, grad, segment_ids=None, block_length=None):
  """Output and gradients of query, key and value, in float64, one (row, head) at a time."""
  query, key, value, grad = (np.asarray(x, np.float64) for x in (query, key, value, grad))
  group = N // key.shape[2]
  out, dquery, dkey, dvalue = (np.zeros_like(x) for x in (query, query, key, value))
  for b in range(B):
    allowed = np.ones((L, L), bool)
    for i in range(L):
      for j in range(L):
        if segment_ids is not None and segment_ids[b, i] != segment_ids[b, j]:
          allowed[i, j] = False
        if block_length is not None and i // block_length < j // block_length:
          allowed[i, j] = False
    for n in range(N):
      q, k, v, g = query[b, :, n], key[b, :, n // group], value[b, :, n // group], grad[b, :, n]
      scores = np.where(allowed, q @ k.T / np.sqrt(H), -np.inf)
      p = np.exp(scores - scores.max(1, keepdims=True))
      p /= p.sum(1, keepdims=True)
      out[b, :, n] = p @ v
      dp = g @ v.T
      ds = p * (dp - (p * dp).sum(1, keepdims=True)) / np.sqrt(H)
      dquery[b, :, n] = ds @ k
      dkey[b, :, n // group] += ds.T @ q
      dvalue[b, :, n // group] += p.T @ g
  return out, dquery, dkey, dvalue


def value_and_gradients(implementation, query, key, value, grad, segment_ids, block_length):
  def run(query, key, value, grad):
    out, vjp = jax.vjp(
      lambda *args: attention(
        *args, segment_ids, block_length=block_length, implementation=implementation
      ),
      query,
      key,
      value,
    )
    return out, *vjp(grad)

  return jax.jit(run)(query, key, value, grad)


MASKS = [
  pytest.param(False, None, id="full"),
  pytest.param(True, None, id="packed"),
  pytest.param(False, 5, id="block_causal"),  # 5 does not divide 12
  pytest.param(True, 4, id="packed_block_causal"),
]


@pytest.mark.parametrize("packed, block_length", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("implementation", RUNNABLE)
def test_values_and_gradients(implementation, kv_heads, packed, block_length):
  args = operands(kv_heads)
  ids = packed_rows() if packed else None
  want = softmax_attention(*args, ids, block_length)
  got = value_and_gradients(implementation, *args, ids, block_length)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Rows that fit: 4 (but 4 does not divide 6: 3), 1, and less than one (1 all the same).
@pytest.mark.parametrize("scores", [4 * N * L * L, N * L * L, 1])
def test_batches_that_do_not_fit_one_block(monkeypatch, scores):
  args, ids = operands(kv_heads=2), packed_rows()
  monkeypatch.setattr(row_blocks, "SCORES_PER_BLOCK", scores)
  got = value_and_gradients("row_blocks", *args, ids, 4)
  for a, b in zip(got, softmax_attention(*args, ids, 4), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_blocks_of_one_are_causal(implementation):
  query, key, value, _ = operands()
  run = jax.jit(lambda *args: attention(*args, block_length=1, implementation=implementation))
  before = run(query, key, value)
  np.testing.assert_allclose(before[:, 0], value[:, 0], rtol=1e-6)  # sees itself alone
  key, value = key.at[:, 7:].add(3.0), value.at[:, 7:].add(3.0)
  after = run(query, key, value)
  np.testing.assert_array_equal(after[:, :7], before[:, :7])
  assert (jnp.abs(after[:, 7:] - before[:, 7:]).max((0, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_scores_far_apart_do_not_overflow(implementation):
  query, key, value, grad = operands()
  got = value_and_gradients(implementation, 1e3 * query, key, value, grad, packed_rows(), None)
  want = softmax_attention(1e3 * query, key, value, grad, packed_rows())
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(b).max())


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_bfloat16_stays_near_float64(implementation):
  args = operands(kv_heads=2, dtype=jnp.bfloat16)
  got = value_and_gradients(implementation, *args, packed_rows(), None)
  for a, b in zip(got, softmax_attention(*args, packed_rows()), strict=True):
    assert a.dtype == jnp.bfloat16
    assert np.abs(np.asarray(a, np.float64) - b).max() < 2**-6 * np.abs(b).max()


def test_a_cpu_is_given_the_row_blocks():
  args = *operands(), packed_rows(), None
  chosen = value_and_gradients(None, *args)
  for a, b in zip(chosen, value_and_gradients("row_blocks", *args), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "query, key, value, segment_ids",
  [
    ((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 2, 8), None),
    ((2, 6, 4, 8), (2, 6, 3, 8), (2, 6, 3, 8), None),  # 3 does not divide 4
    ((2, 6, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8), (2, 6)),  # which segments have the 5 keys?
    ((2, 6, 4, 8), (1, 6, 4, 8), (1, 6, 4, 8), None),
    ((2, 6, 4, 8), (2, 6, 4, 6), (2, 6, 4, 6), None),
    ((6, 4, 8), (6, 4, 8), (6, 4, 8), None),
    ((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8), (1, 6)),
    ((2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8), (2, 5)),
  ],
)
def test_shapes_that_do_not_fit(query, key, value, segment_ids):
  ids = None if segment_ids is None else jnp.ones(segment_ids, jnp.int32)
  with pytest.raises(ValueError, match="expected") as error:
    attention(jnp.zeros(query), jnp.zeros(key), jnp.zeros(value), ids)
  assert str(query if ids is None else query[1]) in str(error.value)


def test_unknown_implementation():
  with pytest.raises(ValueError, match="'flash'.*row_blocks"):
    attention(*operands()[:3], implementation="flash")
