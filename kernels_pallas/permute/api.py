"""To expert order and back: signatures, checks, derivatives, and which implementation runs where.

`dispatch` and `combine` are each other's transpose, and both, with their derivatives, are gathers:
what a back end offers is in `reference.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import op
from kernels_pallas.permute import reference

IMPLEMENTATIONS = ("reference", "pallas_tpu", "pallas_gpu")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


def dispatch(
  x: jax.Array,
  order: jax.Array,
  inverse: jax.Array,
  k: int,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Tokens in expert order, without a k-fold copy of them in between.

  Args:
    x: [T, D].
    order: int32[R], the slot (token * k + j) of each row; from T * k on: padding.
    inverse: int32[T * k], the row of each slot; from R on: the slot is not here. It is what the
      derivative gathers by, and must fit `order`.
    k: slots of a token.
    implementation: one of `IMPLEMENTATIONS`; None chooses by the platform that is lowered for,
      `reference` on CPU.

  Returns:
    [R, D] in the dtype of `x`: row r is x[order[r] // k]; zero, or some row of x, in padding.

  Raises:
    ValueError: for shapes that do not fit, an unknown implementation, or (at the latest when
      lowered) one that cannot run where it is to run.
  """
  if x.ndim != 2 or order.ndim != 1 or inverse.shape != (x.shape[0] * k,):
    raise ValueError(
      f"expected x [T, D], order [R] and inverse [T * k], got {x.shape}, {order.shape} and "
      f"{inverse.shape} for k={k}"
    )
  _check(implementation)
  return _dispatch(implementation, k, op.vary_like(x, x, order), order, inverse)


def collect(
  rows: jax.Array,
  order: jax.Array,
  inverse: jax.Array,
  k: int,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Every token's sum over its slots, y_t = sum_j rows[inverse_tj]: what `dispatch` transposes.

  Its derivative needs no rows: where weights can be multiplied in before, this is the way back.

  Args:
    rows: [R, D] in expert order, see `combine`.
    order: int32[R], see `dispatch`.
    inverse: int32[T * k].
    k: slots of a token.
    implementation: see `dispatch`.

  Returns:
    [T, D] in the dtype of `rows`, summed in float32. The gradient is zero in padding.

  Raises:
    ValueError: as `dispatch`.
  """
  if rows.ndim != 2 or order.shape != rows.shape[:1] or inverse.ndim != 1 or inverse.size % k:
    raise ValueError(
      f"expected rows [R, D], order [R] and inverse [T * k], got {rows.shape}, {order.shape} and "
      f"{inverse.shape} for k={k}"
    )
  _check(implementation)
  return _collect(implementation, k, op.vary_like(rows, rows, inverse), order, inverse)


def combine(
  rows: jax.Array,
  weights: jax.Array,
  order: jax.Array,
  inverse: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Every token's weighted sum over its slots: y_t = sum_j weights_tj rows[inverse_tj].

  Args:
    rows: [R, D] in expert order. Rows that no slot points to may hold anything, NaN included.
    weights: float32[T, k].
    order: int32[R], see `dispatch`.
    inverse: int32[T * k]. A slot that is not here adds nothing.
    implementation: see `dispatch`.

  Returns:
    [T, D] in the dtype of `rows`, summed in float32. The gradient of `rows` is zero in padding,
    that of `weights` where the slot is not here.

  Raises:
    ValueError: as `dispatch`.
  """
  if rows.ndim != 2 or order.shape != rows.shape[:1] or inverse.shape != (weights.size,):
    raise ValueError(
      f"expected rows [R, D], weights [T, k], order [R] and inverse [T * k], got {rows.shape}, "
      f"{weights.shape}, {order.shape} and {inverse.shape}"
    )
  _check(implementation)
  rows, weights = op.vary_like((rows, weights), rows, weights, inverse)
  return _combine(implementation, rows, weights, order, inverse)


def _check(implementation):
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(implementation, k, x, order, inverse):
  del inverse
  return _run(implementation, "gather", x, order // k)


def _dispatch_forward(implementation, k, x, order, inverse):
  return _dispatch(implementation, k, x, order, inverse), inverse


def _dispatch_backward(implementation, k, inverse, grad):
  return _sums(implementation, k, grad, inverse), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def _sums(implementation, k, rows, inverse):
  def ones(gather, rows, inverse):
    return gather(rows, None, inverse)

  return _run(implementation, "weighted_combine", rows, inverse.reshape(-1, k), around=ones)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _collect(implementation, k, rows, order, inverse):
  del order
  return _sums(implementation, k, rows, inverse)


_collect.defvjp(
  lambda implementation, k, rows, order, inverse: (
    _collect(implementation, k, rows, order, inverse),
    order,
  ),
  lambda implementation, k, order, grad: (
    _run(implementation, "gather", grad, order // k),
    None,
    None,
  ),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(implementation, rows, weights, order, inverse):
  del order
  return _run(implementation, "weighted_combine", rows, weights, inverse.reshape(weights.shape))


def _combine_forward(implementation, rows, weights, order, inverse):
  return _combine(implementation, rows, weights, order, inverse), (rows, weights, order, inverse)


def _combine_backward(implementation, residuals, grad):
  rows, weights, order, inverse = residuals
  k = weights.shape[1]
  scale = weights.reshape(-1).at[order].get(mode="fill", fill_value=0).astype(jnp.float32)
  drows, products = _run(implementation, "gather_scaled", grad, order // k, scale, rows)
  dweights = products.at[inverse].get(mode="fill", fill_value=0).reshape(weights.shape)
  return drows, dweights.astype(weights.dtype), None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _run(implementation, name, *args, around=None):
  """One gather of the implementation, or of each platform's own."""

  def call(backend_name, *args):
    gather = getattr(_backend(backend_name), name)
    return around(gather, *args) if around else gather(*args)

  if implementation is not None:
    chosen, platform = functools.partial(call, implementation), PLATFORMS.get(implementation)
    return op.only_on(platform, implementation, chosen, *args) if platform else chosen(*args)
  cpu, tpu, cuda = (functools.partial(call, name) for name in IMPLEMENTATIONS)
  return op.by_platform(*args, cpu=cpu, tpu=tpu, cuda=cuda)


def _backend(name):
  # Imported when used, since Pallas takes time.
  if name == "pallas_gpu":
    from kernels_pallas.permute import pallas_gpu as backend
  elif name == "pallas_tpu":
    from kernels_pallas.permute import pallas_tpu as backend
  else:
    backend = reference
  return backend
