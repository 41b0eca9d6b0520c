"""Muon on this model's parameters: which are matrices, and along which of their axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

INWARD = MuonDimensionNumbers(reduction_axis=(-3,), output_axis=(-2, -1))  # [.., D, N, H]
OUTWARD = MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=(-1,))  # [.., N, H, D]
PLAIN = MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,))  # [.., D, F]
HALVES = MuonDimensionNumbers(reduction_axis=(-3,), output_axis=(-1,))  # [.., D, 2, F]

# The last two names on the way to a parameter -> its axes. All others, layers and experts, are
# those of a stack of matrices.
MATRICES = {
  ("query", "kernel"): INWARD,
  ("key", "kernel"): INWARD,
  ("value", "kernel"): INWARD,
  ("out", "kernel"): OUTWARD,
  ("gate", "kernel"): PLAIN,
  ("up", "kernel"): PLAIN,
  ("down", "kernel"): PLAIN,
  ("moe", "gate_up"): HALVES,
  ("moe", "down"): PLAIN,
}


def is_matrix(names: Sequence[str]) -> bool:
  """Whether the parameter with these names on the way to it is a (stacked) matrix of a layer."""
  return tuple(names[-2:]) in MATRICES


def orthogonalized(
  *, beta: float, nesterov: bool, ns_steps: int, rms: float
) -> optax.GradientTransformation:
  """Momentum, each matrix of it orthogonalised and scaled by rms * sqrt(max(D, F)).

  Of trees in which every parameter is one of `MATRICES`. An expert's gate and up projections, which
  lie side by side in one array [D, 2F], are two matrices.
  """
  muon = scale_by_muon(
    beta=beta, nesterov=nesterov, ns_steps=ns_steps, weight_dimension_numbers=_axes
  )

  def update(updates, state, params=None):
    del params
    new, inner = muon.update(_map(_apart, updates), state._replace(mu=_map(_apart, state.mu)))
    new = _map(lambda names, x: _together(names, rms * _root_of_longer_side(names, x) * x), new)
    return new, MuonState(inner.count, _map(_together, inner.mu), inner.ns_coeffs)

  return optax.GradientTransformation(muon.init, update)


def _map(function, tree):
  return jax.tree_util.tree_map_with_path(
    lambda path, x: function(tuple(key.key for key in path[-2:]), x), tree
  )


def _axes(tree):
  return _map(lambda names, _: MATRICES[names], tree)


def _apart(names, x: jax.Array) -> jax.Array:
  return x.reshape(*x.shape[:-1], 2, -1) if MATRICES[names] is HALVES else x


def _together(names, x: jax.Array) -> jax.Array:
  return x.reshape(*x.shape[:-2], -1) if MATRICES[names] is HALVES else x


def _root_of_longer_side(names, x: jax.Array) -> jax.Array:
  axes = MATRICES[names]
  sides = (
    math.prod(x.shape[axis] for axis in side) for side in (axes.reduction_axis, axes.output_axis)
  )
  return jnp.sqrt(jnp.float32(max(sides)))
