"""Arrays on disk: read with other shardings and types, and told from damaged ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


class CheckpointError(ValueError):
  """No whole checkpoint, or one that does not hold what the program expects."""


def read_arrays(path: epath.Path, name: str, abstract, saved: dict[str, list]):
  """The arrays that were saved as `name`, as `abstract` describes them.

  Args:
    path: the directory of a checkpoint.
    name: of the item in it.
    abstract: shapes, types and shardings; a type that is not the saved one converts.
    saved: what `describe_arrays` said when they were saved.

  Raises:
    CheckpointError: if names or shapes differ.
    OSError: if an array is not what was saved.
  """
  _require_same_arrays(saved, abstract, path)
  handler = ocp.StandardCheckpointHandler()
  tree = handler.restore(path / name, args=ocp.args.StandardRestore(abstract))
  for leaf_name, (_, dtype, checksum) in describe_arrays(tree).items():
    # Orbax notices most damage, but not a changed bit within the numbers of an array.
    if dtype == saved[leaf_name][1] and checksum != saved[leaf_name][2]:
      raise OSError(f"array {leaf_name} of {name!r} is not what was saved")
  return tree


def _require_same_arrays(saved: dict[str, list], abstract, path: epath.Path):
  expected = {name: list(leaf.shape) for name, leaf in _named_leaves(abstract)}
  found = {name: entry[0] for name, entry in saved.items()}
  names = [name for name in found | expected if found.get(name) != expected.get(name)]
  if names:
    lines = [f"{name}: {found.get(name)} saved, {expected.get(name)} expected" for name in names]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    raise CheckpointError(f"{path} holds other arrays: {'; '.join(lines[:3])}{more}")


def as_saved(path: epath.Path):
  tree = ocp.StandardCheckpointHandler().metadata(path / "params").tree
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
  )


def describe_arrays(tree) -> dict[str, list]:
  """Shape, type and checksum of each array by its name, as JSON values.

  The checksum is over the bits of all elements, by position, modulo 2**32. It is computed where
  the array lies and does not depend on how it is sharded.
  """
  checksums = jax.device_get(_checksums(tree))
  return {
    name: [list(leaf.shape), str(leaf.dtype), int(checksum)]
    for (name, leaf), checksum in zip(_named_leaves(tree), checksums, strict=True)
  }


@jax.jit
def _checksums(tree) -> list[jax.Array]:
  return [_checksum(leaf) for leaf in jax.tree.leaves(tree)]


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    bits = x
  else:
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned)
  mixed = bits.astype(jnp.uint32)
  for axis in range(bits.ndim):
    # Another odd multiplier per axis (of the 32-bit golden ratio), so that swaps show.
    factor = np.uint32((0x9E3779B1 * (2 * axis + 1)) % 2**32)
    mixed ^= factor * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  # The finalizer of MurmurHash3, a bijection: no change of one element is lost in the sum.
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _named_leaves(tree) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]
