"""Grouped matmul by others: `jax.lax.ragged_dot_general`, or tokamax's of the same signature.

To compare with. What JAX's costs depends on the compiler: XLA for CPUs expands it to E dense
products, libtpu 0.0.42 does so in the weight gradient.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class RaggedDot:
  """The passes of a back end, see `kernels_pallas.grouped_matmul.api`.

  Attributes:
    library: "jax" or "tokamax".
  """

  library: str

  def forward(self, lhs, rhs, group_sizes, *, transpose_rhs=False, tiling=None):
    del tiling
    dims = (((1,), (2 if transpose_rhs else 1,)), ((), ()))
    out = self._general(lhs, rhs, group_sizes, dims, [0])
    # Some back ends leave the rows beyond the last group unwritten.
    return jnp.where(_live(lhs, group_sizes), out, 0).astype(lhs.dtype)

  def swiglu(self, lhs, gate_up, group_sizes, *, keep, tiling=None):
    pre = self.forward(lhs, gate_up, group_sizes, tiling=tiling)
    gate, up = jnp.split(pre.astype(jnp.float32), 2, axis=1)
    act = (jax.nn.silu(gate) * up).astype(lhs.dtype)
    return (act, pre) if keep else act

  def gradient_rhs(self, lhs, grad, group_sizes, *, dtype, tiling=None):
    del tiling
    live = _live(lhs, group_sizes)
    lhs, grad = jnp.where(live, lhs, 0), jnp.where(live, grad, 0)
    return self._general(lhs, grad, group_sizes, (((0,), (0,)), ((), ())), []).astype(dtype)

  def _general(self, a, b, group_sizes, dims, groups):
    numbers = lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=dims, lhs_ragged_dimensions=[0], rhs_group_dimensions=groups
    )
    kwargs = dict(ragged_dot_dimension_numbers=numbers, preferred_element_type=jnp.float32)
    general = lax.ragged_dot_general if self.library == "jax" else _tokamax()
    return general(a, b, group_sizes, **kwargs)


def _live(rows, group_sizes):
  return (jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None]


def _tokamax():
  try:
    import tokamax
  except ImportError as error:
    raise ValueError(
      "implementation 'tokamax' needs the package tokamax (Python 3.12, jax 0.11.1 or newer), "
      f"which cannot be imported here: {error}"
    ) from error
  return tokamax.ragged_dot_general
