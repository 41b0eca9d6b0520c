"""GPU kernels on a machine without a GPU: lowered for CUDA, and interpreted where that exists."""

import functools
import re

import grouped_laws as laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import op
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, mosaic_gpu, triton
from kernels_pallas.grouped_matmul.row_tiles import row_tiles

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
OPS = {"matmul": grouped_matmul, "swiglu": grouped_swiglu}
LAWS = {"matmul": laws.matmul, "swiglu": laws.swiglu}

mosaic_interpreter = pytest.mark.skipif(
  not hasattr(plgpu, "force_gpu_interpret_mode"),
  reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels (0.12 has): "
  "their numerics run on the second Python version",
)


def kernels(name, implementation, dtype, kind, backward):
  """The kernels in what LLaDA-MoE's shapes are lowered to: "triton" and "mosaic", in order."""
  rows, depth, width, experts = 65536, 2048, 1024, 64
  columns = 2 * width if name == "swiglu" else width
  shapes = (rows, depth), (experts, depth, columns), (rows, width)
  lhs, rhs, grad = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

  def run(lhs, rhs, sizes, grad):
    call = functools.partial(OPS[name], group_sizes=sizes, implementation=implementation)
    if not backward:
      return call(lhs, rhs)
    out, vjp = jax.vjp(call, lhs, rhs)
    return out, *vjp(grad)

  with op.target(kind):
    traced = jax.jit(run).trace(lhs, rhs, jax.ShapeDtypeStruct((experts,), jnp.int32), grad)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  return re.findall(r"stablehlo.custom_call @\S*?(triton|mosaic)", text)


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.quick
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
  "implementation, dtype, kind, want",
  [
    (None, "bfloat16", H100, ["mosaic", "mosaic", "triton"]),
    (None, "bfloat16", A100, ["triton"] * 3),
    (None, "float32", H100, ["triton"] * 3),
    slow(None, "bfloat16", "NVIDIA H200", ["mosaic", "mosaic", "triton"]),
    slow("mosaic_gpu", "bfloat16", H100, ["mosaic"] * 3),
    slow("mosaic_gpu", "float16", H100, ["mosaic"] * 3),
    slow("triton", "bfloat16", H100, ["triton"] * 3),
  ],
)
def test_forward_and_backward_are_lowered(name, implementation, dtype, kind, want):
  assert kernels(name, implementation, dtype, kind, backward=True) == want


@pytest.mark.parametrize("kind, want", [(H100, "mosaic"), (A100, "triton")])
def test_inference_is_lowered(kind, want):
  assert kernels("swiglu", None, "bfloat16", kind, backward=False) == [want]


@pytest.mark.quick
def test_the_weight_gradient_of_mosaic_is_lowered():
  tiling = mosaic_gpu.GRADIENT_RHS
  lower_any(mosaic_gpu, tiling)


@pytest.mark.parametrize("backend", [mosaic_gpu, triton])
def test_candidates_differ(backend):
  found = backend.candidates((65536, 64, 2048, 1024), jnp.bfloat16)
  assert len(set(found)) == len(found) > 20
  assert found[0] == backend.FORWARD and backend.GRADIENT_RHS in found


@pytest.mark.slow
@pytest.mark.parametrize("backend", [mosaic_gpu, triton])
def test_every_candidate_is_lowered(backend):
  for tiling in backend.candidates((65536, 64, 2048, 1024), jnp.bfloat16):
    lower_any(backend, tiling)


def lower_any(backend, tiling):
  """Lowers the passes that the tiling fits; at least one."""
  lhs, rhs = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 2048), (64, 2048, 1024))
  )
  grad, sizes = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), jnp.zeros(64, jnp.int32)
  passes = (
    lambda lhs, rhs, grad: backend.forward(lhs, rhs, sizes, tiling=tiling),
    lambda lhs, rhs, grad: backend.gradient_rhs(
      lhs, grad, sizes, dtype=jnp.bfloat16, tiling=tiling
    ),
  )
  errors = []
  with op.target(H100):
    for one in passes:
      try:
        jax.jit(one).trace(lhs, rhs, grad).lower(lowering_platforms=("cuda",))
      except ValueError as error:
        errors.append(error)
  assert len(errors) < 2, errors


def test_what_cannot_run_says_why():
  lhs, rhs, sizes, _ = laws.operands("no_tail", jnp.float32)
  with op.target(H100), pytest.raises(ValueError, match="float32.*implementation='triton'"):
    mosaic_gpu.forward(lhs, rhs, sizes)
  lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
  with op.target(H100), pytest.raises(ValueError, match="64 x 256 in steps of 64"):
    mosaic_gpu.forward(lhs, rhs, sizes, tiling=op.Tiling(rows=64, columns=256, depth=64))
  with op.target(H100), pytest.raises(ValueError, match="stages"):
    tiling = op.Tiling(rows=128, columns=64, depth=64, stages=1)
    mosaic_gpu.forward(lhs, rhs, sizes, tiling=tiling)
  weights = jax.ShapeDtypeStruct((1 << 10, 1 << 11, (1 << 10) + 1), jnp.bfloat16)
  rows = jax.ShapeDtypeStruct((8, 1 << 11), jnp.bfloat16)
  with pytest.raises(ValueError, match=r"up to 2\*\*31 numbers.*mosaic_gpu"):
    jax.eval_shape(triton.forward, rows, weights, jnp.zeros(1 << 10, jnp.int32))


def test_tiles_that_shared_memory_cannot_hold_are_an_error():
  big = op.Tiling(rows=128, columns=256, depth=64, stages=5)
  lhs, rhs, sizes, _ = laws.operands("crossing_tiles", jnp.bfloat16)
  with op.target(H100), pytest.raises(ValueError, match="shared memory"):
    f = functools.partial(mosaic_gpu.forward, tiling=big)
    jax.jit(f).trace(lhs, rhs, sizes).lower(lowering_platforms=("cuda",))


@pytest.mark.skipif(
  hasattr(plgpu, "force_gpu_interpret_mode"), reason=f"jax {jax.__version__} can interpret them"
)
def test_a_mosaic_kernel_is_not_interpreted_by_a_jax_that_cannot():
  lhs, rhs, sizes, _ = laws.operands("no_tail", jnp.bfloat16)
  with op.interpret(), pytest.raises(NotImplementedError, match="0.12"):
    mosaic_gpu.forward(lhs, rhs, sizes)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("case", laws.CASES)
def test_row_tiles_own_every_row_once(case, align):
  tiles = jax.jit(row_tiles, static_argnums=(1, 2, 3))
  rows, _, _, sizes = laws.CASES[case]
  for block in (16, 64):
    group, start, low, high = map(np.asarray, tiles(jnp.array(sizes), rows, block, align))
    owner = np.full(rows, -1)
    for g, s, a, b in zip(group, start, low, high, strict=True):
      assert s % align == 0 and (a >= b or s <= a and b <= s + block)
      assert (owner[a:b] == -1).all()
      owner[a:b] = g
    np.testing.assert_array_equal(owner[: sum(sizes)], np.repeat(range(len(sizes)), sizes))
    assert (owner[sum(sizes) :] == len(sizes)).all()


def check(run, name, case, dtype, factor=1):
  args = laws.operands(case, dtype, doubled=name == "swiglu")
  with op.interpret():
    got = jax.jit(run)(*args)
  for i, (a, b) in enumerate(zip(got, LAWS[name](*args), strict=True)):
    laws.assert_near(a, b, dtype, factor if i else 1)


def value_and_gradients(name, implementation):
  def run(lhs, rhs, sizes, grad):
    call = functools.partial(OPS[name], group_sizes=sizes, implementation=implementation)
    out, vjp = jax.vjp(call, lhs, rhs)
    return out, *vjp(grad)

  return run


# In small tiles and float32: test_grouped_matmul.py.
def test_triton_kernels_with_their_own_tiles():
  check(value_and_gradients("swiglu", "triton"), "swiglu", "odd_shapes", jnp.bfloat16, factor=2)


@pytest.mark.quick
@mosaic_interpreter
@pytest.mark.parametrize("name", OPS)
def test_mosaic_kernels_obey_the_laws(monkeypatch, name):
  """Races between warpgroups are detected too."""
  small = op.Tiling(rows=128, columns=64, depth=64, stages=2)
  for default in ("FORWARD", "SWIGLU"):
    monkeypatch.setattr(mosaic_gpu, default, small)
  gradient = op.Tiling(rows=64, columns=64, depth=128, stages=2)
  monkeypatch.setattr(mosaic_gpu, "GRADIENT_RHS", gradient)
  run = value_and_gradients(name, "mosaic_gpu")
  check(run, name, "crossing_tiles", jnp.bfloat16, factor=2)


@pytest.mark.slow
@mosaic_interpreter
@pytest.mark.parametrize("case", laws.CASES)
@pytest.mark.parametrize("name", OPS)
def test_mosaic_kernels_with_their_own_tiles(name, case):
  check(value_and_gradients(name, "mosaic_gpu"), name, case, jnp.bfloat16, factor=2)
