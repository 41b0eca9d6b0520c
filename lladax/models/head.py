"""The output head's cross-entropy on a mesh; see `kernels_pallas.cross_entropy`."""

from __future__ import annotations

import jax

from kernels_pallas.cross_entropy import weighted_nll
from kernels_pallas.op import vary_like
from lladax.sharding import axes_in, gather, joined, on_devices, spec, total


def weighted_nll_on_mesh(hidden, kernel, axes, targets, weights) -> tuple[jax.Array, jax.Array]:
  """`weighted_nll` of hidden states [B, L, D], each device computing its own positions.

  Positions are split over the tensor axis too, the kernel is gathered.

  Args:
    hidden: [B, L, D].
    kernel: [D, V], cast to the dtype of `hidden`.
    axes: logical names of the kernel's axes.
    targets: int32[B, L].
    weights: float32[B, L].

  Returns:
    float32[], float32[B, L].
  """
  rows = spec(targets.shape, "batch", "head_length")
  lies, split = spec(kernel.shape, *axes), axes_in(*rows)

  def local(hidden, kernel, targets, weights):
    kernel = gather(kernel.astype(hidden.dtype), lies, split, whole=True)
    hidden, kernel = vary_like((hidden, kernel), hidden, kernel, weights)
    loss, nll = weighted_nll(
      hidden.reshape(targets.size, -1), kernel, targets.reshape(-1), weights.reshape(-1)
    )
    return total(loss, split), nll.reshape(targets.shape)

  of_hidden = joined(*rows, None)
  loss, nll = on_devices(
    local, (of_hidden, lies, rows, rows), (joined(), rows), hidden, kernel, targets, weights
  )
  return loss, jax.lax.stop_gradient(nll)
