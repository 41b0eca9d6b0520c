"""The output head's cross-entropy: signature, checks, derivative."""

from __future__ import annotations

import jax

from kernels_pallas.cross_entropy import reference, row_blocks

IMPLEMENTATIONS = ("row_blocks", "reference")


def weighted_nll(
  hidden: jax.Array,
  kernel: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """sum_i weights_i * nll_i and nll_i = -log softmax(hidden_i kernel)[targets_i].

  Differentiable in `hidden` and `kernel` through the first result; the second carries none.

  Args:
    hidden: [T, D].
    kernel: [D, V].
    targets: int32[T].
    weights: float32[T]. Rows of weight 0 are not computed, and their targets may be any number.
    implementation: one of `IMPLEMENTATIONS`; None is `row_blocks`.

  Returns:
    float32[] and float32[T], the latter 0 where the weight is 0.

  Raises:
    ValueError: for shapes that do not fit or an unknown implementation.
  """
  rows = hidden.shape[:1]
  fits = hidden.ndim == kernel.ndim == 2 and hidden.shape[1] == kernel.shape[0]
  if not fits or targets.shape != rows or weights.shape != rows:
    raise ValueError(
      "expected hidden [T, D], kernel [D, V], targets [T] and weights [T], got "
      f"{hidden.shape}, {kernel.shape}, {targets.shape} and {weights.shape}"
    )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")
  run = reference.weighted_nll if implementation == "reference" else _row_blocks
  return run(hidden, kernel, targets, weights)


@jax.custom_vjp
def _row_blocks(hidden, kernel, targets, weights):
  total, nll, _ = row_blocks.visit(hidden, kernel, targets, weights, with_gradient=False)
  return total, nll


def _forward(hidden, kernel, targets, weights):
  total, nll, gradients = row_blocks.visit(hidden, kernel, targets, weights, with_gradient=True)
  return (total, nll), gradients


def _backward(gradients, cotangents):
  scale = cotangents[0]
  return (*(scale.astype(g.dtype) * g for g in gradients), None, None)


_row_blocks.defvjp(_forward, _backward)
