"""The head's cross-entropy on a mesh equals that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cross_entropy import row_blocks, weighted_nll
from lladax.models.head import weighted_nll_on_mesh
from lladax.sharding import MeshConfig, make_mesh, use_mesh

D, V = 8, 12


def value_and_gradients(f, hidden, kernel, targets, weights):
  @jax.jit
  def run(hidden, kernel):
    return jax.value_and_grad(
      lambda hidden, kernel: f(hidden, kernel, targets, weights), (0, 1), has_aux=True
    )(hidden, kernel)

  (total, nll), (dhidden, dkernel) = run(hidden, kernel)
  return total, nll, dhidden, dkernel


MESHES = (
  MeshConfig(),
  MeshConfig(fsdp=4, expert=2),
  MeshConfig(fsdp=2, tensor=2, context=2),  # rows split over all; the vocabulary is gathered
)


@pytest.mark.parametrize("batch", [8, 3])  # 3 rows do not divide among 8 devices
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_of_eight_equals_one_device(monkeypatch, mesh, batch):
  monkeypatch.setattr(row_blocks, "BLOCK_ROWS", 8)
  keys = jax.random.split(jax.random.key(1), 4)
  hidden = jax.random.normal(keys[0], (batch, 8, D))
  targets = jax.random.randint(keys[1], (batch, 8), 0, V)
  # Devices have unequal shares, the first none at all.
  weights = jax.random.uniform(keys[2], (batch, 8)) * (jnp.arange(8) < jnp.arange(batch)[:, None])
  kernel = jax.random.normal(keys[3], (D, V))

  def plain(hidden, kernel, targets, weights):
    flat = hidden.reshape(-1, D), kernel, targets.ravel(), weights.ravel()
    total, nll = weighted_nll(*flat, implementation="reference")
    return total, nll.reshape(targets.shape)

  want = value_and_gradients(plain, hidden, kernel, targets, weights)

  def on_mesh(hidden, kernel, targets, weights):
    return weighted_nll_on_mesh(hidden, kernel, ("embed", "vocab"), targets, weights)

  with use_mesh(make_mesh(mesh)):
    got = value_and_gradients(on_mesh, hidden, kernel, targets, weights)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
