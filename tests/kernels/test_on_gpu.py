"""The laws of the kernels, run for real where there is a GPU.

JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_on_gpu.py -n 0 -m ''
"""

import functools

import grouped_laws as laws
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import attention, cross_entropy, expert_ffn, fused_moe, gpu
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, mosaic_gpu, triton
from kernels_pallas.permute import pallas_gpu, reference

pytestmark = pytest.mark.skipif(
  jax.default_backend() != "gpu",
  reason=f"no GPU: JAX runs on {jax.default_backend()!r} here, the kernels are interpreted and "
  "lowered in the other files",
)
OPS = {"matmul": grouped_matmul, "swiglu": grouped_swiglu}
LAWS = {"matmul": laws.matmul, "swiglu": laws.swiglu}
BACKENDS = {"mosaic_gpu": mosaic_gpu, "triton": triton}


def skip_unless_it_runs(implementation, dtype):
  if implementation == "mosaic_gpu" and not (gpu.is_hopper() and dtype != "float32"):
    pytest.skip(
      f"mosaic_gpu is for Hopper GPUs and 16 bits: {jax.devices()[0].device_kind}, {dtype}"
    )


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu", "triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [*laws.CASES, *laws.LARGE])
@pytest.mark.parametrize("name", OPS)
def test_grouped_products_and_their_gradients(name, case, dtype, implementation):
  skip_unless_it_runs(implementation, dtype)
  args = laws.operands(case, dtype, doubled=name == "swiglu")

  def run(lhs, rhs, sizes, grad):
    call = functools.partial(OPS[name], group_sizes=sizes, implementation=implementation)
    out, vjp = jax.vjp(call, lhs, rhs)
    return out, *vjp(grad)

  for i, (a, b) in enumerate(zip(jax.jit(run)(*args), LAWS[name](*args), strict=True)):
    laws.assert_near(a, b, dtype, 2 if i else 1)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_every_candidate_computes_the_same(implementation):
  """Or says at once that it does not fit."""
  skip_unless_it_runs(implementation, "bfloat16")
  backend = BACKENDS[implementation]
  lhs, rhs, sizes, grad = laws.operands("uneven", "bfloat16")
  out, dlhs, drhs = laws.matmul(lhs, rhs, sizes, grad)
  ran = 0
  for tiling in backend.candidates((*lhs.shape[:1], *rhs.shape), lhs.dtype):
    passes = (
      (lambda t=tiling: backend.forward(lhs, rhs, sizes, tiling=t), out),
      (lambda t=tiling: backend.forward(grad, rhs, sizes, transpose_rhs=True, tiling=t), dlhs),
      (lambda t=tiling: backend.gradient_rhs(lhs, grad, sizes, dtype=lhs.dtype, tiling=t), drhs),
    )
    for call, want in passes:
      try:
        got = jax.block_until_ready(jax.jit(call)())
      except (ValueError, jax.errors.JaxRuntimeError) as error:
        assert "memory" in str(error) or "multiple" in str(error) or "resource" in str(error)
        continue
      laws.assert_near(got, want, "bfloat16", 2)
      ran += 1
  assert ran > 20


def test_the_same_numbers_twice():
  """Persistent blocks race for nothing: results are equal to the last bit."""
  args = laws.operands("uneven", "bfloat16")

  @jax.jit
  def run(lhs, rhs, sizes, grad):
    out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes), lhs, rhs)
    return out, *vjp(grad)

  first = run(*args)
  for _ in range(20):
    for a, b in zip(run(*args), first, strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(333, 8, 2048, 1999), (7, 2, 40, 14)], ids=str)
def test_rows_are_moved(shape, dtype):
  tokens, slots, width, here = shape
  rng = np.random.default_rng(0)
  order = rng.permutation(tokens * slots)[:here]
  inverse = np.full(tokens * slots, 2**30, np.int32)
  inverse[order] = np.arange(here)
  rows = rng.normal(size=(here + 4, width))
  rows[here:] = np.nan
  x, rows = jnp.array(rng.normal(size=(tokens, width)), dtype), jnp.array(rows, dtype)
  index = jnp.array([*(order // slots), tokens, -1, 2**30, tokens * slots], jnp.int32)
  scale = jnp.array(rng.normal(size=here + 4), jnp.float32)
  weights = jnp.array(rng.normal(size=(tokens, slots)), jnp.float32)

  def moves(module):
    def run(x, rows):
      return (
        module.gather(x, index),
        *module.gather_scaled(x, index, scale, rows),
        module.weighted_combine(rows, weights, jnp.array(inverse).reshape(tokens, slots)),
      )

    return [np.asarray(a, np.float64) for a in jax.jit(run)(x, rows)]

  for a, b in zip(moves(pallas_gpu), moves(reference), strict=True):
    rtol = 2**-7 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("tokens", [1, 37, 512])
def test_the_layer_and_its_gradients(tokens):
  """Dispatch, SwiGLU experts and combine, chosen for this GPU, against NumPy in float64."""
  experts, depth, width, slots = 8, 256, 128, 3
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = (tokens, depth), (experts, depth, 2 * width), (experts, width, depth)
  x, gate_up, down = (
    jax.random.normal(k, s, jnp.bfloat16) * s[-2] ** -0.5
    if len(s) == 3
    else jax.random.normal(k, s, jnp.bfloat16)
    for k, s in zip(keys, shapes, strict=False)
  )
  chosen = jnp.argsort(jax.random.uniform(keys[3], (tokens, experts)), axis=1)[:, :slots]
  weights = jax.random.uniform(keys[4], (tokens, slots))
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  route = order, jnp.argsort(order).astype(jnp.int32), jnp.bincount(flat, length=experts)

  def loss(x, gate_up, down, weights):
    return (expert_ffn.expert_ffn(x, gate_up, down, weights, *route).astype(jnp.float32) ** 2).sum()

  def plain(x, gate_up, down, weights):
    hidden = jnp.einsum("td,tkdf->tkf", x, gate_up[chosen])
    hidden = jax.nn.silu(hidden[..., :width]) * hidden[..., width:]
    return (jnp.einsum("tkf,tkfd,tk->td", hidden, down[chosen], weights) ** 2).sum()

  args = x, gate_up, down, weights
  got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*args)
  with jax.default_matmul_precision("highest"):
    high = [a.astype(jnp.float32) for a in args]
    want = jax.jit(jax.value_and_grad(plain, (0, 1, 2, 3)))(*high)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    laws.assert_near(a, np.asarray(b, np.float64), "bfloat16", 4)


@pytest.mark.parametrize("tokens", [1, 8, 100])
@pytest.mark.parametrize("narrow", [None, "int8", "float8_e4m3fn"])
def test_decoding_equals_the_layer_for_training(narrow, tokens):
  experts, depth, width, slots = 16, 256, 128, 4
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(keys[0], (tokens, depth), jnp.bfloat16)
  gate_up = jax.random.normal(keys[1], (experts, depth, 2 * width), jnp.bfloat16) * depth**-0.5
  down = jax.random.normal(keys[2], (experts, width, depth), jnp.bfloat16) * width**-0.5
  chosen = jnp.argsort(jax.random.uniform(keys[3], (tokens, experts)), axis=1)[:, :slots]
  weights = jax.random.uniform(keys[4], (tokens, slots))
  args = (gate_up, down) if narrow is None else fused_moe.quantize(gate_up, down, jnp.dtype(narrow))
  route = weights, chosen.astype(jnp.int32)
  run = functools.partial(fused_moe.fused_moe, implementation="reference")
  want = jax.jit(run)(x, *args, *route)
  got = jax.jit(fused_moe.fused_moe)(x, *args, *route)
  laws.assert_near(got, np.asarray(want, np.float64), "bfloat16", 4)


@pytest.mark.parametrize("segments", [False, True])
def test_attention_and_its_gradients(segments):
  shape = (2, 512, 4, 64)
  keys = jax.random.split(jax.random.key(0), 4)
  args = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
  ids = jnp.repeat(jnp.array([[1, 1, 2, 3], [1, 2, 2, 2]]), 128, axis=1) if segments else None

  def run(implementation, query, key, value, grad):
    call = functools.partial(attention.attention, segment_ids=ids, implementation=implementation)
    out, vjp = jax.vjp(call, query, key, value)
    return out, *vjp(grad)

  got = jax.jit(functools.partial(run, None))(*args)
  with jax.default_matmul_precision("highest"):
    high = [x.astype(jnp.float32) for x in args]
    want = jax.jit(functools.partial(run, "reference"))(*high)
  for a, b in zip(got, want, strict=True):
    laws.assert_near(a, np.asarray(b, np.float64), "bfloat16", 4)


def test_the_head():
  tokens, depth, words = 200, 128, 1000
  keys = jax.random.split(jax.random.key(0), 2)
  hidden = jax.random.normal(keys[0], (tokens, depth), jnp.bfloat16)
  kernel = jax.random.normal(keys[1], (depth, words), jnp.bfloat16) * depth**-0.5
  targets = jnp.arange(tokens) * 7 % words
  weights = jnp.where(jnp.arange(tokens) % 3 == 0, 0, 1 / tokens)

  def loss(implementation, hidden, kernel):
    name = dict(implementation=implementation)
    return cross_entropy.weighted_nll(hidden, kernel, targets, weights, **name)[0]

  got, want = (
    jax.jit(jax.value_and_grad(functools.partial(loss, name), (0, 1)))(hidden, kernel)
    for name in (None, "reference")
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    high = np.asarray(b, np.float64)
    np.testing.assert_allclose(
      np.asarray(a, np.float64), high, rtol=2**-6, atol=2**-6 * np.abs(high).max()
    )
