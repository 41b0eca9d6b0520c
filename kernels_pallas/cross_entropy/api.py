"""The output head's cross-entropy: signature, checks, derivative, and what runs where."""

from __future__ import annotations

import functools

import jax

from kernels_pallas import op
from kernels_pallas.cross_entropy import reference, row_blocks

IMPLEMENTATIONS = ("row_blocks", "pallas_tpu", "reference")


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
    implementation: one of `IMPLEMENTATIONS`; None chooses by the platform that is lowered for:
      `pallas_tpu` on TPUs if it takes these operands, else `row_blocks`. Neither ever holds [T, V]
      numbers.

  Returns:
    float32[] and float32[T], the latter 0 where the weight is 0.

  Raises:
    ValueError: for shapes that do not fit, an unknown implementation, or one that was named and
      cannot take them, with its reason. When lowered: one that was named and runs elsewhere.
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
  if implementation == "pallas_tpu" and (reason := _kernels().refusal(hidden, kernel)):
    raise ValueError(
      f"'pallas_tpu' cannot run here: {reason}. Use 'row_blocks' or None, which chooses"
    )
  args = hidden, kernel, targets, weights
  args = op.vary_like(args, args)
  return (
    reference.weighted_nll(*args) if implementation == "reference" else _run(implementation, *args)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(implementation, *args):
  total, nll, _ = _visit(implementation, *args, with_gradient=False)
  return total, nll


def _forward(implementation, *args):
  total, nll, gradients = _visit(implementation, *args, with_gradient=True)
  return (total, nll), gradients


def _backward(implementation, gradients, cotangents):
  del implementation
  scale = cotangents[0]
  return (*(scale.astype(g.dtype) * g for g in gradients), None, None)


_run.defvjp(_forward, _backward)


def _visit(implementation, *args, with_gradient):
  rows = functools.partial(row_blocks.visit, with_gradient=with_gradient)
  large = functools.partial(rows, block_rows=row_blocks.ACCELERATOR_BLOCK_ROWS)

  def kernels(*args):
    return _kernels().visit(*args, with_gradient=with_gradient, interpret=op.interpreted())

  def kernels_if_they_can(*args):
    return large(*args) if _kernels().refusal(*args[:2]) else kernels(*args)

  if implementation == "row_blocks":
    return rows(*args)
  if implementation == "pallas_tpu":
    return op.only_on("tpu", implementation, kernels, *args)
  return op.by_platform(*args, cpu=rows, tpu=kernels_if_they_can, cuda=large)


def _kernels():
  # Importing Pallas takes a third of a second.
  from kernels_pallas.cross_entropy import pallas_tpu

  return pallas_tpu
