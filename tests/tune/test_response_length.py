"""Per-response normalisation: an answer counts the same alone in a row and packed with others."""

import jax
import numpy as np
import pytest

from lladax.diffusion import Band, Objective, ResponseLength, Unweighted
from lladax.sharding import MeshConfig, make_mesh, use_mesh
from lladax.train.loop import place
from lladax.types import Batch

# (prompt, answer) of each segment, in rows; the last segment of the second row has no answer.
ROWS = [[(2, 3), (1, 5)], [(0, 1), (4, 2), (3, 0)]]
LENGTH = 14


def batch_of(rows) -> Batch:
  segment_ids, maskable = (np.zeros((len(rows), LENGTH), kind) for kind in (np.int32, bool))
  for row, segments in enumerate(rows):
    at = 0
    for number, (prompt, answer) in enumerate(segments, 1):
      segment_ids[row, at : at + prompt + answer] = number
      maskable[row, at + prompt : at + prompt + answer] = True
      at += prompt + answer
  zeros = np.zeros_like(segment_ids)
  return Batch(tokens=zeros, segment_ids=segment_ids, positions=zeros, maskable=maskable)


def weights(batch: Batch) -> jax.Array:
  objective = Objective(times=Band(0.999, 1.0), weight=Unweighted(), normalize=ResponseLength())
  return objective.noise(batch, 0, 0, mask_id=1).weights


def test_weights_by_hand():
  batch = batch_of(ROWS)
  expected = np.zeros((2, LENGTH))
  for row, segments in enumerate(ROWS):
    for number, (_, answer) in enumerate(segments, 1):
      own = (batch.segment_ids[row] == number) & batch.maskable[row]
      expected[row, own] = 1 / answer / 4 if answer else 0  # of four answers
  np.testing.assert_allclose(weights(batch), expected, rtol=1e-6)
  assert weights(batch).sum() == pytest.approx(1)


def test_packed_and_alone_weigh_the_same():
  packed, alone = batch_of(ROWS), batch_of([[segment] for row in ROWS for segment in row])
  of_packed, of_alone = (np.asarray(weights(batch))[batch.maskable] for batch in (packed, alone))
  np.testing.assert_array_equal(of_packed, of_alone)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "context": 2}])
def test_devices_see_the_whole_batch(sizes):
  random = np.random.default_rng(0)
  rows = [[tuple(random.integers(0, 3, 2)) for _ in range(3)] for _ in range(16)]
  batch = batch_of(rows)
  mesh = make_mesh(MeshConfig(**sizes))
  with use_mesh(mesh):
    sharded = jax.jit(weights)(place(batch, mesh))
  np.testing.assert_array_equal(sharded, weights(batch))
