"""The laws of grouped matmul in NumPy and float64, and the operands that break kernels."""

import jax
import jax.numpy as jnp
import numpy as np

# R, D, F, group sizes: the tail beyond their sum is poisoned.
CASES = {
  "odd_shapes": (75, 40, 24, (13, 0, 37, 1, 16)),
  "no_tail": (48, 32, 16, (16, 32)),
  "only_a_tail": (20, 16, 16, (0, 0, 0)),
  "one_row_groups": (9, 24, 32, (1, 1, 1, 1, 1, 1, 1, 1, 1)),
  "crossing_tiles": (333, 96, 72, (127, 0, 129, 1, 70)),
}
# For the hardware: full tiles and their edges.
LARGE = {
  "uneven": (4100, 512, 384, (1000, 0, 1, 129, 2047, 128, 0, 640)),
  "one_group": (1024, 256, 512, (1024,)),
  "mostly_tail": (8192, 256, 128, (3, 0, 125, 200)),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


def operands(case, dtype, doubled=False):
  """lhs, rhs, group sizes and a gradient; NaN wherever a kernel may not look."""
  rows, depth, width, sizes = (CASES | LARGE)[case]
  live = sum(sizes)
  keys = jax.random.split(jax.random.key(0), 3)
  lhs = jax.random.normal(keys[0], (rows, depth), dtype).at[live:].set(jnp.nan)
  rhs = jax.random.normal(keys[1], (len(sizes), depth, width * (1 + doubled)), dtype)
  grad = jax.random.normal(keys[2], (rows, width), dtype).at[live:].set(jnp.nan)
  return lhs, rhs, jnp.array(sizes, jnp.int32), grad


def product(lhs, rhs, sizes):
  """Each row times its group's matrix, group by group; zero beyond the groups."""
  lhs, rhs = (np.asarray(x, np.float64) for x in (lhs, rhs))
  out, start = np.zeros((lhs.shape[0], rhs.shape[2])), 0
  for matrix, size in zip(rhs, np.asarray(sizes), strict=True):
    out[start : start + size] = lhs[start : start + size] @ matrix
    start += size
  return out


def outer(lhs, grad, sizes):
  """[E, D, F]: the rows of a group, transposed, times their gradients."""
  lhs, grad = (np.asarray(x, np.float64) for x in (lhs, grad))
  ends = np.cumsum(sizes)
  starts = ends - np.asarray(sizes)
  return np.stack([lhs[a:b].T @ grad[a:b] for a, b in zip(starts, ends, strict=True)])


def matmul(lhs, rhs, sizes, grad):
  """The output and the gradients of lhs and rhs."""
  rhs = np.asarray(rhs, np.float64)
  dlhs = product(grad, rhs.swapaxes(1, 2), sizes)
  return product(lhs, rhs, sizes), dlhs, outer(lhs, grad, sizes)


def swiglu(lhs, gate_up, sizes, grad):
  """The output and the gradients of lhs and gate_up."""
  live = int(np.sum(sizes))
  gate, up = np.split(product(lhs, gate_up, sizes), 2, axis=1)
  sigmoid = 1 / (1 + np.exp(-gate))
  high = np.where(np.arange(len(grad))[:, None] < live, np.asarray(grad, np.float64), 0)
  dgate = high * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
  dpre = np.concatenate([dgate, high * gate * sigmoid], axis=1)
  _, dlhs, drhs = matmul(lhs, gate_up, sizes, dpre)
  return gate * sigmoid * up, dlhs, drhs


def assert_near(got, want, dtype, factor=1):
  assert got.shape == want.shape
  got = np.asarray(got, np.float64)
  tolerance = factor * TOLERANCE[jnp.dtype(dtype).name]
  assert np.isfinite(got).all()
  assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1)
