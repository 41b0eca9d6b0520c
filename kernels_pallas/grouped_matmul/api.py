"""Grouped matmul: signatures, checks, derivatives, and which implementation runs where.

A back end is a module (or an object) with three passes, whose `tiling` None means its default:

  forward(lhs, rhs, group_sizes, *, transpose_rhs=False, tiling=None) -> [R, F]
  swiglu(lhs, gate_up, group_sizes, *, keep, tiling=None) -> [R, F], with `keep` also what went
    into the activation: one array [R, 2F], or (gate, up) of [R, F] each (TPU)
  gradient_rhs(lhs, grad, group_sizes, *, dtype, tiling=None) -> [E, D, F]
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import gpu, op
from kernels_pallas.grouped_matmul import live_blocks, reference
from kernels_pallas.grouped_matmul.ragged_dot import RaggedDot

IMPLEMENTATIONS = (
  "live_blocks",
  "pallas_tpu",
  "mosaic_gpu",
  "triton",
  "ragged_dot",
  "tokamax",
  "reference",
)
# Where those run that do not run everywhere.
PLATFORMS = {"pallas_tpu": "tpu", "mosaic_gpu": "cuda", "triton": "cuda"}


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  by_row: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies each row of `lhs` by the matrix of its group; differentiable in `lhs` and `rhs`.

  Args:
    lhs: [R, D], rows sorted by group. Those that belong to no group may hold anything, NaN
      included; the same goes for the gradient of the output.
    rhs: [E, D, F], of the same dtype.
    group_sizes: int32[E], adding up to at most R. Rows beyond their sum belong to no group.
    by_row: `permute.combine` follows. On TPU the output is then stored as its row copies need it.
    implementation: one of `IMPLEMENTATIONS`. None chooses by the platform that is lowered for: on
      CPU `live_blocks`, since XLA expands `ragged_dot` to E dense products there; on TPU
      `pallas_tpu`; on Hopper GPUs `mosaic_gpu` and, for the gradient of `rhs`, `triton`, which all
      other GPUs take throughout.

  Returns:
    [R, F] in the dtype of `lhs`, accumulated in float32; zero in rows that belong to no group.

  Raises:
    ValueError: for shapes or dtypes that do not fit, an unknown implementation, or (at the latest
      when lowered) one that cannot run where it is to run.
  """
  _check(lhs, rhs, group_sizes, implementation)
  if implementation == "reference":
    return reference.grouped_matmul(lhs, rhs, group_sizes)
  # The derivative of this sums gradients of weights over devices that have different rows.
  return _grouped_matmul(implementation, by_row, *op.vary_like((lhs, rhs), lhs, rhs), group_sizes)


def grouped_swiglu(
  lhs: jax.Array,
  gate_up: jax.Array,
  group_sizes: jax.Array,
  *,
  by_row: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """silu(lhs gate) * (lhs up), rows and matrices by group, in one pass over the rows.

  The activation is computed in float32 from the products as accumulated. For the backward pass
  both products are kept in the dtype of `lhs`.

  Args:
    lhs: [R, D], see `grouped_matmul`.
    gate_up: [E, D, 2F], gate before up, of the same dtype.
    group_sizes: int32[E].
    by_row: `lhs` comes from `permute.dispatch`, whose derivative copies rows of its gradient.
    implementation: see `grouped_matmul`.

  Returns:
    [R, F] in the dtype of `lhs`; zero in rows that belong to no group.

  Raises:
    ValueError: as `grouped_matmul`, and for an odd last axis of `gate_up`.
  """
  _check(lhs, gate_up, group_sizes, implementation)
  if gate_up.shape[2] % 2:
    raise ValueError(f"expected gate_up [E, D, 2F], got {gate_up.shape}")
  if implementation == "reference":
    return reference.grouped_swiglu(lhs, gate_up, group_sizes)
  lhs, gate_up = op.vary_like((lhs, gate_up), lhs, gate_up)
  return _grouped_swiglu(implementation, by_row, lhs, gate_up, group_sizes)


def _check(lhs, rhs, group_sizes, implementation):
  if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
    raise ValueError(f"expected lhs [R, D] and rhs [E, D, F], got {lhs.shape} and {rhs.shape}")
  if lhs.dtype != rhs.dtype:
    raise ValueError(f"lhs and rhs must have one dtype, got {lhs.dtype} and {rhs.dtype}; cast one")
  if group_sizes.shape != rhs.shape[:1]:
    raise ValueError(f"expected group_sizes [{rhs.shape[0]}], got {group_sizes.shape}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"unknown implementation {implementation!r}; one of {IMPLEMENTATIONS}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(implementation, by_row, lhs, rhs, group_sizes):
  return _run(implementation, "forward", lhs, rhs, group_sizes, by_row=by_row)


def _matmul_forward(implementation, by_row, *args):
  return _grouped_matmul(implementation, by_row, *args), args


def _matmul_backward(implementation, by_row, residuals, grad):
  del by_row
  return _gradients(implementation, *residuals, grad, by_row=False)


_grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


def _gradients(implementation, lhs, rhs, group_sizes, grad, *, by_row):
  back = dict(transpose_rhs=True, by_row=by_row)
  dlhs = _run(implementation, "forward", grad, rhs, group_sizes, **back)
  drhs = _run(implementation, "gradient_rhs", lhs, grad, group_sizes, dtype=rhs.dtype)
  return dlhs, drhs, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_swiglu(implementation, by_row, lhs, gate_up, group_sizes):
  del by_row
  return _run(implementation, "swiglu", lhs, gate_up, group_sizes, keep=False)


def _swiglu_forward(implementation, by_row, *args):
  del by_row
  out, pre = _run(implementation, "swiglu", *args, keep=True)
  return out, (*args, pre)


def _swiglu_backward(implementation, by_row, residuals, grad):
  *args, pre = residuals
  gate, up = (x.astype(jnp.float32) for x in _halves(pre))
  high = grad.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  dgate = high * up * (sigmoid + silu * (1 - sigmoid))
  dpre = jnp.concatenate([dgate, high * silu], axis=1).astype(grad.dtype)
  return _gradients(implementation, *args, dpre, by_row=by_row)


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _halves(pre):
  return pre if isinstance(pre, tuple) else tuple(jnp.split(pre, 2, axis=1))


def _run(implementation, step, *args, **static):
  """One pass of the implementation, or of each platform's own."""
  if implementation is not None:
    call = functools.partial(_call, implementation, step, **static)
    platform = PLATFORMS.get(implementation)
    return op.only_on(platform, implementation, call, *args) if platform else call(*args)

  def on_cpu(*args):
    out = _call("live_blocks", step, *args, **static)
    # Branches must agree on what they keep.
    paired = static.get("keep") and op.target_platform() == "tpu"
    return (out[0], _halves(out[1])) if paired else out

  return op.by_platform(
    *args,
    cpu=on_cpu,
    tpu=functools.partial(_call, "pallas_tpu", step, **static),
    cuda=functools.partial(_call, _for_gpu(step, args[0].dtype), step, **static),
  )


def _call(name, step, lhs, other, group_sizes, **static):
  if name != "pallas_tpu":
    static.pop("by_row", None)
  if static.get("transpose_rhs"):
    pass_name, width = "forward_transposed", other.shape[1]
  else:
    pass_name, width = step, other.shape[-1]
  shape = lhs.shape[0], group_sizes.shape[0], lhs.shape[1], width
  tiled = name in PLATFORMS
  tiling = op.tuned(f"grouped_matmul.{name}.{pass_name}", shape, lhs.dtype) if tiled else None
  return getattr(backend(name), step)(lhs, other, group_sizes, tiling=tiling, **static)


def backend(name: str):
  """What has the passes of an implementation; imported when used, since Pallas takes time, and not
  all can be anywhere.
  """
  if name == "pallas_tpu":
    from kernels_pallas.grouped_matmul import pallas_tpu

    return pallas_tpu
  if name == "mosaic_gpu":
    from kernels_pallas.grouped_matmul import mosaic_gpu

    return mosaic_gpu
  if name == "triton":
    from kernels_pallas.grouped_matmul import triton

    return triton
  return {
    "live_blocks": live_blocks,
    "ragged_dot": RaggedDot("jax"),
    "tokamax": RaggedDot("tokamax"),
  }[name]


def _for_gpu(step, dtype):
  """Hopper's matrix units take two bytes per number; for weight gradients Triton is the faster."""
  mosaic = gpu.is_hopper() and step != "gradient_rhs" and jnp.dtype(dtype).itemsize == 2
  return "mosaic_gpu" if mosaic else "triton"
