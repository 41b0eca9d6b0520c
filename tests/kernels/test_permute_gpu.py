"""The GPU's row movers, interpreted, against the reference; and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import op
from kernels_pallas.permute import pallas_gpu, reference

# tokens, slots, D, rows that are here: none divides a block.
SHAPES = [(11, 3, 40, 27), (1, 8, 24, 8), (20, 1, 600, 20)]


def operands(shape, dtype):
  """Rows that no slot points to are NaN, and so are the weights of slots that are elsewhere."""
  tokens, slots, width, here = shape
  rng = np.random.default_rng(0)
  total = tokens * slots
  order = rng.permutation(total).astype(np.int32)[:here]
  inverse = np.full(total, here + 5, np.int32)
  inverse[order] = np.arange(here)
  absent = inverse >= here
  inverse[absent & (np.arange(total) % 2 == 0)] = -1
  rows = rng.normal(size=(here + 4, width))
  rows[here:] = np.nan
  weights = np.where(absent, np.nan, rng.normal(size=total)).reshape(tokens, slots)
  index = np.concatenate([order // slots, [tokens, total, -1, 2**31 - 1]]).astype(np.int32)
  x = rng.normal(size=(tokens, width))
  inverse = jnp.array(np.where(absent, np.where(inverse < 0, -1, 2**30), inverse))
  as_rows = [jnp.array(a, dtype) for a in (x, rows)]
  scale = jnp.array(rng.normal(size=here + 4), jnp.float32)
  return (
    *as_rows,
    jnp.array(index),
    scale,
    jnp.array(weights, jnp.float32),
    inverse.reshape(tokens, slots),
  )


def moves(module):
  def run(x, rows, index, scale, weights, inverse):
    return (
      module.gather(x, index),
      *module.gather_scaled(x, index, scale, rows),
      module.weighted_combine(rows, weights, inverse),
      module.weighted_combine(rows, None, inverse),
    )

  return run


@pytest.mark.quick
@pytest.mark.parametrize(
  "shape, dtype",
  [(SHAPES[0], "float32"), (SHAPES[1], "float32"), (SHAPES[2], "bfloat16")],
  ids=str,
)
def test_they_equal_the_reference(shape, dtype):
  args = operands(shape, dtype)
  with op.interpret():
    got = jax.jit(moves(pallas_gpu))(*args)
  for a, b in zip(got, jax.jit(moves(reference))(*args), strict=True):
    assert a.dtype == b.dtype and jnp.isfinite(a.astype(jnp.float32)).all()
    rtol = 2**-7 if a.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
      a.astype(jnp.float32), b.astype(jnp.float32), rtol=rtol, atol=rtol * 1e-1
    )


def test_nothing_to_move():
  x, none = jnp.zeros((0, 8)), jnp.zeros((0,), jnp.int32)
  assert pallas_gpu.gather(jnp.ones((3, 8)), none).shape == (0, 8)
  assert not pallas_gpu.gather(x, jnp.array([0, 5])).any()
  assert not pallas_gpu.weighted_combine(x, None, jnp.zeros((2, 3), jnp.int32)).any()


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
def test_they_are_lowered_for_cuda(kind):
  x, rows = (jax.ShapeDtypeStruct((n, 2048), jnp.bfloat16) for n in (8192, 65536))
  index, inverse = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((65536,), (8192, 8)))
  scale, weights = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((65536,), (8192, 8)))
  with op.target(kind):
    traced = jax.jit(moves(pallas_gpu)).trace(x, rows, index, scale, weights, inverse)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("__gpu$xla.gpu.triton") == 4


def test_arrays_that_offsets_cannot_address():
  rows = jax.ShapeDtypeStruct((1 << 20, (1 << 11) + 1), jnp.bfloat16)
  with pytest.raises(ValueError, match=r"up to 2\*\*31 numbers"):
    jax.eval_shape(pallas_gpu.gather, rows, jnp.zeros(8, jnp.int32))
