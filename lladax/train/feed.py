"""From the rows that a process reads to the global batch on the mesh."""

from __future__ import annotations

import jax
import numpy as np

from lladax.sharding import batch_sharding
from lladax.types import Batch


def process_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that devices of this process hold, in increasing order.

  Processes that share rows (where the tensor or context axis goes over several of them) are both
  told them: they must feed the same, and do, since a batch is a function of its step.
  """
  index = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  held = np.zeros(batch_size, bool)
  for (rows,) in index.values():
    held[rows] = True
  return np.flatnonzero(held)


def place(batch: Batch, mesh: jax.sharding.Mesh, rows: np.ndarray, batch_size: int) -> Batch:
  """The global batch, of which this process has these rows.

  Args:
    batch: numpy arrays [len(rows), ...].
    mesh: the devices.
    rows: `process_rows`, the number of each row in the global batch.
    batch_size: of the global batch, B.
  """
  sharding = batch_sharding(mesh)
  where = np.full(batch_size, -1)
  where[rows] = np.arange(len(rows))

  def to_devices(local):
    local = np.asarray(local)

    def part(index):
      first, *others = index
      return local[(where[first], *others)]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

  return jax.tree.map(to_devices, batch)
