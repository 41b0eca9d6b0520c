"""Every implementation of the weighted cross-entropy against a plain log-softmax in float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import op
from kernels_pallas.cross_entropy import IMPLEMENTATIONS, pallas_tpu, row_blocks, weighted_nll

T, D, V = 300, 8, 768


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
  logits -= logits.max(1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  nll = -log_p[np.arange(len(log_p)), targets]
  dlogits = weights[:, None] * (np.exp(log_p) - np.eye(kernel.shape[1])[np.asarray(targets)])
  nll = np.where(weights != 0, nll, 0)
  return (weights * nll).sum(), nll, dlogits @ kernel.T, hidden.T @ dlogits


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Five blocks of 64 rows; two tiles of 256 rows and three of 256 words."""
  monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 64)
  monkeypatch.setattr(pallas_tpu, "LARGEST_TILE", 256)


@functools.cache
def compiled(implementation, differentiated=True, f=weighted_nll):
  """Jitted total and nll, with gradients of hidden and kernel; compiled once per shape."""
  run = functools.partial(f, implementation=implementation)

  def both(*args):
    if not differentiated:
      return run(*args)
    (total, nll), gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(*args)
    return total, nll, *gradients

  return jax.jit(both)


def run(implementation, *args, **options):
  with op.interpret() if implementation == "pallas_tpu" else contextlib.nullcontext():
    return compiled(implementation, **options)(*args)


def assert_close(got, want, tolerance=1e-5):
  for a, b in zip(got, want, strict=True):
    scale = np.abs(b).max() + 1e-9
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * scale)


each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@each
def test_values_and_gradients_equal_the_log_softmax(implementation):
  args = operands()
  assert 0 < (args[3] == 0).sum() < T
  assert_close(run(implementation, *args), plain(*args))


# Of 300 rows: all in one block, 34 blocks, one for each.
@pytest.mark.parametrize("block", [1024, 9, 1])
def test_blocks_of_any_size(block):
  args = operands()
  with_gradient = functools.partial(row_blocks.visit, with_gradient=True, block_rows=block)
  total, nll, gradients = jax.jit(with_gradient)(*args)
  assert_close((total, nll, *gradients), plain(*args))


@each
def test_the_pass_without_gradients_gives_the_same(implementation):
  args = operands()
  assert_close(run(implementation, *args, differentiated=False), plain(*args)[:2])


# None; one; a block; a tile and one more; all.
@pytest.mark.parametrize("count", [0, 1, 64, 257, T])
@each
def test_however_many_rows_are_supervised(implementation, count):
  hidden, kernel, targets, _ = operands()
  weights = jnp.where(np.random.default_rng(0).permutation(T) < count, 2.0, 0.0)
  got = run(implementation, hidden, kernel, targets, weights)
  assert_close(got, plain(hidden, kernel, targets, weights))
  if count == 0:  # exactly nothing, and not 0 / 0
    for leaf in got:
      np.testing.assert_array_equal(leaf, 0)


@each
def test_targets_without_weight_may_be_no_ids(implementation):
  hidden, kernel, targets, weights = operands()
  ignored = jnp.where(weights != 0, targets, jnp.where(targets > 400, -100, 10**6))
  got = run(implementation, hidden, kernel, ignored, weights)
  assert_close(got, plain(hidden, kernel, targets, weights))


# The last word of a tile and the first of the next.
@pytest.mark.parametrize("target", [511, 512])
@each
def test_one_target_for_all_and_negative_weights(implementation, target):
  hidden, kernel, targets, weights = operands()
  weights *= jnp.where(jnp.arange(T) % 3, 1, -1)
  args = hidden, kernel, jnp.full_like(targets, target), weights
  assert_close(run(implementation, *args), plain(*args))


@each
def test_logits_far_apart_do_not_overflow(implementation):
  hidden, *rest = operands()
  args = 1e3 * hidden, *rest
  # The largest logits and their neighbours are some thousands: float32 has three digits behind.
  assert_close(run(implementation, *args), plain(*args), 1e-3)


@each
def test_bfloat16_is_summed_in_float32(implementation):
  args = operands(dtype=jnp.bfloat16)
  got = run(implementation, *args)
  assert [x.dtype.name for x in got] == ["float32", "float32", "bfloat16", "bfloat16"]
  want = plain(*args)
  assert_close(got[:2], want[:2], 1e-5)  # products of bfloat16 are exact in float32
  assert_close(got[2:], want[2:], 2**-6)


def scaled(*args, implementation):
  total, nll = weighted_nll(*args, implementation=implementation)
  return -3.0 * total + nll.sum(), nll


@each
def test_the_nll_carries_no_gradient_and_the_total_is_linear_in_its_cotangent(implementation):
  args = operands()
  *_, dhidden, dkernel = run(implementation, *args)
  assert_close(run(implementation, *args, f=scaled)[2:], (-3 * dhidden, -3 * dkernel))


def test_two_cores_share_the_rows_with_a_weight():
  visited = []
  for kind, tiles in (("TPU v5", 6), ("TPU v5", 5), ("TPU v6 lite", 6)):
    with op.target(kind):
      visited.append([int(pallas_tpu._interleaved(tiles, i)) for i in range(tiles)])
  assert visited == [[0, 2, 4, 1, 3, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
  args = operands(rows=1000)  # four tiles, two of them without a weight
  with op.target("TPU v5"), op.interpret():
    got = compiled("pallas_tpu")(*args)
  assert_close(got, plain(*args))


@pytest.mark.parametrize("check_vma", [True, False])
def test_rows_on_four_devices(check_vma):
  args = operands(rows=64)
  mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
  split, whole = PartitionSpec("batch"), PartitionSpec()

  def local(*args):
    total, nll = weighted_nll(*args)
    return jax.lax.psum(total, "batch"), nll

  over_devices = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(split, whole, split, split),
    out_specs=(whole, split),
    check_vma=check_vma,
  )

  @jax.jit
  def both(*args):
    (total, nll), gradients = jax.value_and_grad(over_devices, (0, 1), has_aux=True)(*args)
    return total, nll, *gradients

  assert_close(both(*args), plain(*args))


def temporary_bytes(f, rows, width, vocabulary, dtype):
  shapes = [
    jax.ShapeDtypeStruct((rows, width), dtype),
    jax.ShapeDtypeStruct((width, vocabulary), dtype),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    jax.ShapeDtypeStruct((rows,), jnp.float32),
  ]
  return f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_no_array_of_tokens_by_vocabulary_exists_on_a_cpu(monkeypatch):
  monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 256)
  shape = dict(rows=8192, width=64, vocabulary=157184, dtype=jnp.bfloat16)
  logits = 4 * shape["rows"] * shape["vocabulary"]
  # The measure sees such an array.
  assert temporary_bytes(compiled("reference"), **shape) >= logits
  assert temporary_bytes(compiled(None), **shape) < logits / 8


@pytest.mark.parametrize(
  "shapes",
  [
    ((4, 8), (7, 16), (4,), (4,)),
    ((4, 8), (8, 16), (5,), (4,)),
    ((4, 8), (8, 16), (4,), (4, 1)),
    ((2, 4, 8), (8, 16), (2, 4), (2, 4)),
  ],
)
def test_shapes_that_do_not_fit(shapes):
  with pytest.raises(ValueError, match="expected hidden") as error:
    weighted_nll(*(jnp.zeros(shape) for shape in shapes))
  assert str(shapes[2]) in str(error.value)


def test_implementations_that_cannot_run():
  args = operands()
  with pytest.raises(ValueError, match="'fused'.*row_blocks"):
    weighted_nll(*args, implementation="fused")
  with pytest.raises(ValueError, match="'pallas_tpu' runs on tpu only"):
    compiled("pallas_tpu").lower(*args)
  hidden, kernel, *rest = args
  with pytest.raises(ValueError, match="'pallas_tpu' cannot run here: .*not 767"):
    weighted_nll(hidden, kernel[:, :-1], *rest, implementation="pallas_tpu")
  with pytest.raises(ValueError, match="'pallas_tpu' cannot run here: .*float16"):
    half = hidden.astype(jnp.float16), kernel.astype(jnp.float16)
    weighted_nll(*half, *rest, implementation="pallas_tpu")


def test_where_the_kernels_cannot_run_rows_are_visited_in_large_blocks():
  hidden, kernel, *rest = operands(rows=2000)
  for kind, platform in (("TPU v5", "tpu"), ("NVIDIA H100 80GB HBM3", "cuda")):
    with op.target(kind):
      lowered = (
        jax.jit(lambda *args: weighted_nll(*args))
        .trace(hidden, kernel[:, :-1], *rest)
        .lower(lowering_platforms=(platform,))
      )
    assert f"tensor<{row_blocks.ACCELERATOR_BLOCK_ROWS}x767xf32>" in lowered.as_text()
