"""Every implementation of the weighted cross-entropy against a plain log-softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cross_entropy import row_blocks, weighted_nll

T, D, V = 37, 8, 11


def operands(rows=T, dtype=jnp.float32, share=0.5):
  keys = jax.random.split(jax.random.key(0), 5)
  hidden = jax.random.normal(keys[0], (rows, D), dtype)
  kernel = jax.random.normal(keys[1], (D, V), dtype)
  targets = jax.random.randint(keys[2], (rows,), 0, V)
  weights = jax.random.uniform(keys[3], (rows,), minval=0.1, maxval=9.0)
  weights = jnp.where(jax.random.bernoulli(keys[4], share, (rows,)), weights, 0)
  return hidden, kernel, targets, weights


def plain(hidden, kernel, targets, weights):
  """float64, by NumPy: total, nll, gradients of hidden and kernel."""
  hidden, kernel, weights = (np.asarray(x, np.float64) for x in (hidden, kernel, weights))
  logits = hidden @ kernel
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  nll = -log_p[np.arange(len(log_p)), targets]
  dlogits = weights[:, None] * (np.exp(log_p) - np.eye(V)[np.asarray(targets)])
  nll = np.where(weights != 0, nll, 0)
  return (weights * nll).sum(), nll, dlogits @ kernel.T, hidden.T @ dlogits


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 8)


@functools.cache
def run(f):
  """Jitted total, nll and gradients of hidden and kernel; compiled once per shape."""

  def both(hidden, kernel, targets, weights):
    (total, nll), gradients = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(
      hidden, kernel, targets, weights
    )
    return total, nll, *gradients

  return jax.jit(both)


def assert_close(got, want, tolerance=1e-5):
  for a, b in zip(got, want, strict=True):
    scale = np.abs(b).max() + 1e-9
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * scale)


# Of 37 rows: all in one block, four blocks and one row over, a block for each.
@pytest.mark.parametrize("block", [256, 9, 1])
def test_values_and_gradients_equal_the_log_softmax(monkeypatch, block):
  monkeypatch.setattr(row_blocks, "BLOCK_ROWS", block)
  args = operands()
  assert 0 < (args[3] == 0).sum() < T
  assert_close(run.__wrapped__(weighted_nll)(*args), plain(*args))


def test_the_pass_without_gradients_gives_the_same():
  args = operands()
  assert_close(jax.jit(weighted_nll)(*args), plain(*args)[:2])


@pytest.mark.parametrize("count", [0, 1, 8, 9, T])
def test_however_many_rows_are_supervised(count):
  hidden, kernel, targets, _ = operands()
  weights = jnp.where(np.random.default_rng(0).permutation(T) < count, 2.0, 0.0)
  got = run(weighted_nll)(hidden, kernel, targets, weights)
  assert_close(got, plain(hidden, kernel, targets, weights))
  if count == 0:  # exactly nothing, and not 0 / 0
    for leaf in got:
      np.testing.assert_array_equal(leaf, 0)


def test_targets_without_weight_may_be_no_ids():
  hidden, kernel, targets, weights = operands()
  ignored = jnp.where(weights != 0, targets, jnp.where(targets > 4, -100, 10**6))
  got = run(weighted_nll)(hidden, kernel, ignored, weights)
  assert_close(got, plain(hidden, kernel, targets, weights))


def test_negative_weights_count_too():
  hidden, kernel, targets, weights = operands()
  weights = weights * jnp.where(jnp.arange(T) % 3, 1, -1)
  args = hidden, kernel, targets, weights
  assert_close(run(weighted_nll)(*args), plain(*args))


def test_logits_far_apart_do_not_overflow():
  hidden, kernel, targets, weights = operands()
  got = run(weighted_nll)(1e3 * hidden, kernel, targets, weights)
  logits = 1e3 * np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
  shifted = logits - logits.max(1, keepdims=True)
  nll = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(T), targets]
  np.testing.assert_allclose(got[0], (np.asarray(weights, np.float64) * nll).sum(), rtol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in got)


def test_bfloat16_is_summed_in_float32():
  args = operands(rows=300, dtype=jnp.bfloat16)
  got = run(weighted_nll)(*args)
  assert [x.dtype.name for x in got] == ["float32", "float32", "bfloat16", "bfloat16"]
  want = plain(*args)
  assert_close(got[:2], want[:2], 1e-5)  # products of bfloat16 are exact in float32
  assert_close(got[2:], want[2:], 2**-6)


def test_the_nll_carries_no_gradient_and_the_total_is_linear_in_its_cotangent():
  args = operands()
  *_, dhidden, dkernel = run(weighted_nll)(*args)

  def other(hidden, kernel, targets, weights):
    total, nll = weighted_nll(hidden, kernel, targets, weights)
    return -3.0 * total + nll.sum(), nll

  assert_close(run(other)(*args)[2:], (-3 * dhidden, -3 * dkernel))


def test_no_array_of_tokens_by_vocabulary_exists(monkeypatch):
  monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 256)
  rows, width, vocabulary = 4096, 16, 4096
  shapes = [
    jax.ShapeDtypeStruct((rows, width), jnp.float32),
    jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    jax.ShapeDtypeStruct((rows,), jnp.float32),
  ]

  def temporary_bytes(f):
    return run(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  def written_out(hidden, kernel, targets, weights):
    log_p = jax.nn.log_softmax(hidden @ kernel)
    nll = -jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    return jnp.vdot(weights, nll), nll

  logits = rows * vocabulary * 4
  assert temporary_bytes(written_out) >= logits  # the measure sees such an array
  assert temporary_bytes(weighted_nll) < logits / 3
