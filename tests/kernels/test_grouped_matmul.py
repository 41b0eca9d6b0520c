"""One suite for every implementation of the grouped matmul, against the one-hot reference."""

import contextlib
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernels_pallas import op
from kernels_pallas.grouped_matmul import (
  IMPLEMENTATIONS,
  api,
  grouped_matmul,
  grouped_swiglu,
  pallas_tpu,
  tpu_tiling,
)

# No tile divides them: several tiles per group, several groups per tile.
R, E, D, F = 70, 5, 40, 24
TILINGS = {
  "pallas_tpu": dict(rows=16, columns=16, depth=16, step=8),
  "triton": dict(rows=16, columns=16, depth=16),
}
OPS = {"matmul": grouped_matmul, "swiglu": grouped_swiglu}


@contextlib.contextmanager
def small_tiles(implementation):
  """Kernels are interpreted, in tiles that such small arrays have several of."""
  fields = TILINGS.get(implementation)
  if fields is None:
    yield
    return

  def tuned(name, shape, dtype):
    columns = 8 if name.endswith("pallas_tpu.swiglu") else fields["columns"]  # divides F
    return op.Tiling(**fields | dict(columns=columns))

  with op.interpret(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(op, "tuned", tuned)
    yield


@functools.cache
def compiled(name, implementation):
  """(lhs, rhs, group_sizes, grad) -> (out, dlhs, drhs), compiled once for all group sizes."""

  @jax.jit
  def run(lhs, rhs, sizes, grad):
    out, vjp = jax.vjp(lambda a, b: OPS[name](a, b, sizes, implementation=implementation), lhs, rhs)
    return out, *vjp(grad)

  with small_tiles(implementation):
    return run.lower(*operands(name, [0] * E)).compile()


def operands(name, sizes, dtype=jnp.float32, depth=D):
  keys = jax.random.split(jax.random.key(0), 3)
  lhs = jax.random.normal(keys[0], (R, depth), dtype)
  rhs = jax.random.normal(keys[1], (E, depth, F if name == "matmul" else 2 * F), dtype)
  grad = jax.random.normal(keys[2], (R, F), dtype)
  return lhs, rhs, jnp.array(sizes, jnp.int32), grad


def assert_equals_the_reference(name, implementation, sizes):
  """Whatever lies in rows that belong to no group."""
  if implementation == "tokamax":
    pytest.importorskip("tokamax", reason="needs Python 3.12 and jax 0.11.1 or newer")
  lhs, rhs, sizes, grad = operands(name, sizes)
  dead = (jnp.arange(R) >= sizes.sum())[:, None]
  want = compiled(name, "reference")(jnp.where(dead, 0, lhs), rhs, sizes, jnp.where(dead, 0, grad))
  poisoned = jnp.where(dead, jnp.nan, lhs), rhs, sizes, jnp.where(dead, jnp.nan, grad)
  got = compiled(name, implementation)(*poisoned)
  for a, b, what in zip(got, want, ("out", "dlhs", "drhs"), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()), err_msg=what)


SIZES = [
  pytest.param([20, 0, 1, 40, 9], id="an_empty_group"),
  pytest.param([0, 0, 70, 0, 0], id="all_in_one"),
  pytest.param([16, 16, 16, 16, 6], id="groups_of_whole_tiles"),
  pytest.param([3, 2, 1, 4, 2], id="many_groups_in_a_tile"),
  pytest.param([17, 0, 20, 0, 3], id="rows_beyond_the_groups"),
  pytest.param([0, 0, 0, 0, 16], id="first_groups_empty"),
  pytest.param([0, 0, 0, 0, 0], id="no_rows_at_all"),
]
# None: what is chosen. The reference is what the others are compared with.
NAMES = [None, *(name for name in IMPLEMENTATIONS if name not in ("reference", "mosaic_gpu"))]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_equal_the_reference(name, implementation, sizes):
  assert_equals_the_reference(name, implementation, sizes)


@st.composite
def group_sizes(draw):
  cuts = sorted(draw(st.lists(st.integers(0, R), min_size=E, max_size=E)))
  return np.diff([0, *cuts]).tolist()


@pytest.mark.parametrize("implementation", ["live_blocks", "pallas_tpu", "triton"])
@pytest.mark.parametrize("name", OPS)
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
@hypothesis.given(sizes=group_sizes())
def test_any_group_sizes(name, implementation, sizes):
  assert_equals_the_reference(name, implementation, sizes)


def test_many_blocks_and_ragged_tails():
  sizes = jnp.array([700, 1, 0, 299, 24], jnp.int32)
  keys = jax.random.split(jax.random.key(0), 3)
  lhs, grad = (jax.random.normal(key, (1024, 4)) for key in keys[:2])
  rhs = jax.random.normal(keys[2], (5, 4, 4))

  def run(name):
    out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, implementation=name), lhs, rhs)
    return out, *vjp(grad)

  run = jax.jit(run, static_argnums=0)
  for got, want in zip(run("live_blocks"), run("reference"), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["live_blocks", "ragged_dot", "pallas_tpu"])
@pytest.mark.parametrize("name", OPS)
def test_bfloat16_is_summed_in_float32(name, implementation):
  lhs, rhs, sizes, _ = operands(name, [20, 0, 1, 40, 9], jnp.bfloat16, depth=512)
  high = OPS[name](*(x.astype(jnp.float32) for x in (lhs, rhs)), sizes, implementation="reference")
  with small_tiles(implementation):
    got = OPS[name](lhs, rhs, sizes, implementation=implementation)
  assert got.dtype == jnp.bfloat16
  # What JAX's own product gives is rounded before the activation.
  rtol = 2**-5 if (name, implementation) == ("swiglu", "ragged_dot") else 2**-8
  np.testing.assert_allclose(got.astype(jnp.float32), high, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", OPS)
def test_weights_of_devices_with_different_rows(name):
  """Types of a `shard_map` are checked; the weights' gradient is the sum over devices."""
  lhs, rhs, _, grad = operands(name, [0] * E)
  sizes = jnp.array([[3, 0, 20, 7, 5], [0, 1, 2, 3, 4]], jnp.int32)
  mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

  def spread(lhs, rhs):
    def local(lhs, sizes, rhs):
      return OPS[name](lhs, rhs, sizes[0])

    specs = P("rows"), P("rows"), P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("rows"))(lhs, sizes, rhs)

  def apart(lhs, rhs):
    halves = zip(jnp.split(lhs, 2), sizes, strict=True)
    return jnp.concatenate([OPS[name](half, rhs, own) for half, own in halves])

  got, want = (jax.jit(lambda f=f: jax.vjp(f, lhs, rhs)[1](grad))() for f in (spread, apart))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_swiglu_where_no_tile_divides_the_width():
  """The TPU form then takes two passes."""
  lhs, rhs, sizes, _ = operands("swiglu", [20, 0, 1, 40, 9])
  assert tpu_tiling.swiglu_tiling(R, D, F, E, lhs.dtype, keep=True) is None
  want = grouped_swiglu(lhs, rhs, sizes, implementation="reference")
  with op.interpret():
    got, (gate, _) = pallas_tpu.swiglu(lhs, rhs, sizes, keep=True)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  product = grouped_matmul(lhs, rhs, sizes, implementation="reference")
  np.testing.assert_allclose(gate, product[:, :F], rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="columns must divide F=24"):
    pallas_tpu.swiglu(lhs, rhs, sizes, keep=True, tiling=op.Tiling(rows=16, columns=16))


def test_output_stored_by_row_is_the_same():
  args = operands("matmul", [17, 0, 20, 0, 3])
  lhs, sizes, rhs = args[0], args[2], jax.random.normal(jax.random.key(1), (E, D, 2048))
  tiling = op.Tiling(rows=16, columns=1024, step=8)
  with op.interpret():
    got, want = (
      pallas_tpu.forward(lhs, rhs, sizes, by_row=by_row, tiling=tiling) for by_row in (True, False)
    )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
@pytest.mark.parametrize(
  "shape",
  [
    (65536, 64, 2048, 1024),
    (32768, 256, 4096, 1024),
    (16384, 8, 4096, 14336),
    (64, 64, 2048, 1408),
  ],
  ids=str,
)
def test_default_tilings_fit_the_chip(kind, shape):
  rows, experts, depth, width = shape
  with op.target(kind):
    vmem, cores = op.chip().vmem, op.chip().cores
    for inner, outer in ((depth, 2 * width), (width, depth)):
      tiling = tpu_tiling.product_tiling(rows, inner, outer, experts, jnp.bfloat16)
      blocks = tiling.rows * (inner + tiling.columns) + inner * tiling.columns
      assert 4 * blocks <= vmem and tiling.columns * cores <= outer + 127 * cores
      tiling = tpu_tiling.gradient_tiling(rows, inner, outer, experts, jnp.bfloat16, jnp.float32)
      blocks = tiling.rows * (tiling.depth + tiling.columns)
      assert 4 * blocks + 12 * tiling.depth * tiling.columns <= vmem
    tiling = tpu_tiling.swiglu_tiling(rows, depth, width, experts, jnp.bfloat16, keep=True)
    assert width % tiling.columns == 0 == tiling.columns % 128


@pytest.mark.parametrize(
  "lhs, rhs, sizes, message",
  [
    ((4, 3), (2, 5, 6), (2,), r"expected lhs \[R, D\]"),
    ((4, 3), (2, 3, 6), (3,), r"group_sizes \[2\]"),
  ],
)
def test_shapes_that_do_not_fit(lhs, rhs, sizes, message):
  for operation in OPS.values():
    with pytest.raises(ValueError, match=message):
      operation(jnp.zeros(lhs), jnp.zeros(rhs), jnp.zeros(sizes, jnp.int32))


def test_operands_that_do_not_fit():
  lhs, rhs, sizes, _ = operands("swiglu", [0] * E)
  with pytest.raises(ValueError, match="one dtype.*float32 and bfloat16"):
    grouped_matmul(lhs, rhs.astype(jnp.bfloat16), sizes)
  with pytest.raises(ValueError, match=r"\[E, D, 2F\]"):
    grouped_swiglu(lhs, rhs[:, :, 1:], sizes)


def test_implementations_that_cannot_run_here():
  args = operands("matmul", [0] * E)[:3]
  with pytest.raises(ValueError, match="'cuda'.*live_blocks"):
    grouped_matmul(*args, implementation="cuda")
  for name, platform in api.PLATFORMS.items():
    with pytest.raises(ValueError, match=f"'{name}' runs on {platform} only.*for cpu"):
      grouped_matmul(*args, implementation=name)
