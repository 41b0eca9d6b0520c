"""What the ops share inside a `shard_map`: making values vary over the mesh as others do."""

from __future__ import annotations

import jax
from jax import lax


def manual_axes(x: jax.Array) -> frozenset[str]:
  """The mesh axes of the enclosing `shard_map` over which the devices' values of `x` may differ."""
  return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_like(x, *references):
  """A tree of arrays, taken to differ between devices wherever one of the references does.

  A loop's carry must be of one type from the start: zeros that rows of a batch are added to vary as
  the rows do. The derivative sums over the axes that were added. Outside `shard_map`, and where its
  types are not checked, this is the identity.
  """
  wanted = frozenset().union(*map(manual_axes, jax.tree.leaves(references)))

  def vary(leaf):
    axes = wanted - manual_axes(leaf)
    return lax.pcast(leaf, tuple(sorted(axes)), to="varying") if axes else leaf

  return jax.tree.map(vary, x)
