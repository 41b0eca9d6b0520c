"""The experts' layer for decoding: every implementation against the dense one-hot reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import op
from kernels_pallas.fused_moe import QuantizedExperts, fused_moe, pallas_gpu, pallas_tpu, quantize
from kernels_pallas.fused_moe.active import find_active
from kernels_pallas.fused_moe.reference import forward

reference = jax.jit(forward)

# Small tiles, so that small operands have several: up to 8 tokens the TPU's kernel multiplies all
# rows for every expert, beyond it gathers.
RUN = {
  "active_blocks": functools.partial(fused_moe, implementation="active_blocks"),
  "pallas_tpu": functools.partial(pallas_tpu.forward, rows=8, tile=8),
  "pallas_gpu": functools.partial(pallas_gpu.forward, rows=16, columns=16, depth=16),
}


@functools.partial(jax.jit, static_argnums=0)
def compiled(implementation, *args):
  return RUN[implementation](*args)


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def run(implementation, *args):
  with op.interpret():
    return compiled(implementation, *args)


def operands(T=20, D=16, E=6, F=16, k=2, skew=0.0, dtype=jnp.float32):
  normal = np.random.default_rng(1).standard_normal
  logits = normal((T, E)) + skew * np.arange(E)
  experts = np.argsort(-logits, axis=1)[:, :k].astype(np.int32)
  x, weights = normal((T, D)), np.abs(normal((T, k))).astype(np.float32)
  gate_up, down = normal((E, D, 2 * F)) * D**-0.5, normal((E, F, D)) * F**-0.5
  x, gate_up, down = (jnp.asarray(array.astype(np.float32), dtype) for array in (x, gate_up, down))
  return x, gate_up, down, jnp.asarray(weights), jnp.asarray(experts)


def poisoned(gate_up, down, experts):
  """NaN wherever no token looks."""
  inactive = [e not in np.asarray(experts) for e in range(down.shape[0])]
  return [
    jnp.asarray(np.where(np.reshape(inactive, (-1, 1, 1)), np.nan, w)) for w in (gate_up, down)
  ]


def assert_close(got, want, tolerance):
  assert got.dtype == want.dtype and got.shape == want.shape
  got, want = (np.asarray(v, np.float32) for v in (got, want))
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize(
  "case",
  [
    dict(T=1),  # two experts of six
    dict(T=5, E=4, k=4),  # all experts for every token
    dict(T=20, skew=50.0, F=13, D=10),  # two experts for all; tiles divide neither F nor D nor T
  ],
  ids=str,
)
@pytest.mark.parametrize("implementation", RUN)
def test_values_equal_the_reference_and_inactive_experts_are_not_read(implementation, case):
  x, gate_up, down, weights, experts = operands(**case)
  got = run(implementation, x, *poisoned(gate_up, down, experts), weights, experts)
  assert_close(got, reference(x, gate_up, down, weights, experts), 1e-5)


@pytest.mark.parametrize(
  "implementation, dtype",
  [
    ("active_blocks", jnp.int8),
    ("active_blocks", jnp.float8_e4m3fn),
    ("active_blocks", jnp.bfloat16),
    ("pallas_tpu", jnp.int8),
    ("pallas_tpu", jnp.float8_e4m3fn),
    slow("pallas_tpu", jnp.bfloat16),
    ("pallas_gpu", jnp.float8_e4m3fn),
    slow("pallas_gpu", jnp.int8),
    slow("pallas_gpu", jnp.bfloat16),
  ],
)
def test_weights_of_other_types(implementation, dtype):
  if dtype == jnp.bfloat16:
    args, tolerance = operands(dtype=dtype), 0.02
  else:
    x, gate_up, down, *routing = operands()
    args, tolerance = (x, *quantize(gate_up, down, dtype), *routing), 1e-5
  assert_close(run(implementation, *args), reference(*args), tolerance)


@pytest.mark.parametrize("implementation", RUN)
def test_experts_elsewhere_add_nothing(implementation):
  x, gate_up, down, weights, experts = operands(T=5)
  experts = experts.at[:, 1].set(jnp.array([6, -1, 1000, 6, -7])).at[0, 0].set(-1)
  here = (experts >= 0) & (experts < 6)
  weights = jnp.where(here, weights, jnp.nan)
  got = run(implementation, x, *poisoned(gate_up, down, experts), weights, experts)
  assert_close(got, reference(x, gate_up, down, jnp.where(here, weights, 0), experts), 1e-5)
  nowhere = run(implementation, x, gate_up, down, weights, jnp.full_like(experts, -1))
  np.testing.assert_array_equal(nowhere, 0)


@pytest.mark.parametrize("implementation", RUN)
def test_an_expert_reaches_only_those_who_chose_it(implementation):
  x, gate_up, down, weights, experts = operands(T=5)
  broken = int(experts[2, 0])
  others = ~(np.asarray(experts) == broken).any(1)
  assert 0 < others.sum() < 5
  got = run(implementation, x, gate_up, down.at[broken].set(jnp.nan), weights, experts)
  want = reference(x, gate_up, down, weights, experts)
  assert_close(got[others], want[others], 1e-5)
  assert jnp.isnan(got[~others]).all()


# As outside these tests, where the compiler contracts products and sums.
OPTIMISED = {"xla_backend_optimization_level": "3"}


@pytest.mark.slow
@pytest.mark.parametrize(
  "implementation, dtype",
  [
    ("active_blocks", jnp.float32),
    slow("active_blocks", jnp.bfloat16),
    ("pallas_tpu", jnp.float32),
    slow("pallas_gpu", jnp.float32),
  ],
)
def test_a_token_does_not_depend_on_the_others(implementation, dtype):
  x, gate_up, down, weights, experts = operands(dtype=dtype, k=3, D=128)

  @functools.partial(jax.jit, compiler_options=OPTIMISED)
  def alike(x, weights, experts):
    return RUN[implementation](x, gate_up, down, weights, experts)

  with op.interpret():
    together = alike(x, weights, experts)
    # Alone, or with few others in another place; among as many, other ones, one of them NaN.
    for rows in (*np.arange(4, 10)[:, None], np.arange(11, 2, -2)):
      some = alike(x[rows], weights[rows], experts[rows])
      np.testing.assert_array_equal(some, together[rows])
    others = x.at[:10].set(x[:10] * -3).at[3].set(jnp.nan)
    others = alike(others, weights, experts.at[:10].set(experts[9::-1]))
  np.testing.assert_array_equal(others[10:], together[10:])
  assert jnp.isnan(others[3]).all() and not (others[:3] == together[:3]).any()


@pytest.mark.parametrize(
  "experts", [[[0, 1], [2, 5]], [[2, 4], [0, 2]], [[1, 3], [5, 3]], [[-1, 9]]]
)
def test_each_tile_of_an_active_expert_is_fetched_once(experts):
  # The pipeline fetches a block when its index is another than in the step before. Two cores take
  # one half of the grid each, and fetch one tile more where theirs has no expert.
  experts, tiles = jnp.array(experts), 3
  make = jax.jit(lambda e: pallas_tpu.make_schedule(find_active(e, 6), jnp.ones(e.shape), tiles))
  schedule = jax.tree.map(np.asarray, make(experts))
  half, i, f = np.indices((2, max(schedule.count.max(), 1), tiles)).reshape(3, -1)
  named = list(zip(*(a.tolist() for a in pallas_tpu.tile_at(half, i, f, schedule)), strict=True))
  fetched = [tile for tile, last in zip(named, [None, *named], strict=False) if tile != last]
  active = sorted(set(experts.ravel().tolist()) & set(range(6)))
  if active:
    assert sorted(fetched) == [(e, f) for e in active for f in range(tiles)]
  used = [tile for tile, live in zip(named, i < schedule.count[half], strict=True) if live]
  assert sorted(used) == [(e, f) for e in active for f in range(tiles)]


@pytest.mark.parametrize(
  "width, depth, stored, tile",
  [
    (1024, 2048, jnp.bfloat16, 512),
    (1024, 2048, jnp.int8, 512),
    (1024, 4096, jnp.bfloat16, 256),
    (768, 2048, jnp.bfloat16, 384),
    (5634, 2048, jnp.bfloat16, 512),
    (64, 256, jnp.bfloat16, 128),
  ],
)
def test_tiles_divide_and_fit(width, depth, stored, tile):
  assert pallas_tpu.choose_tile(width, depth, stored, jnp.bfloat16) == tile


# The root mean square of the error: of weights as measured (see `quantize`), and a tenth more.
@pytest.mark.parametrize("dtype, bound", [(jnp.int8, 0.009), (jnp.float8_e4m3fn, 0.029)])
def test_the_error_of_quantisation(dtype, bound):
  _, gate_up, down, *_ = operands(D=512, F=256, E=2)
  down = down.at[:, :, 3].set(0).at[:, :, 4].multiply(1e-20)
  for exact, stored in zip((gate_up, down), quantize(gate_up, down, dtype), strict=True):
    assert stored.values.dtype == dtype and stored.scales.shape == (2, exact.shape[2])
    error = stored.dequantize() - exact
    rms = lambda x: jnp.sqrt((x**2).mean(1))  # noqa: E731
    assert (rms(error) <= 1.5 * bound * rms(exact)).all()
    assert rms(error.reshape(1, -1)) < bound * rms(exact.reshape(1, -1))
    # What is stored is kept exactly.
    again = quantize(stored.dequantize(), stored.dequantize(), dtype)[0]
    np.testing.assert_array_equal(*(np.asarray(q.values, np.float32) for q in (again, stored)))


def test_a_derivative_is_refused():
  args = operands(T=3)
  quantized = args[0], *quantize(args[1], args[2], jnp.int8), *args[3:]
  for arguments in (args, quantized):
    loss = lambda x, rest=arguments[1:]: fused_moe(x, *rest).sum()  # noqa: E731
    for differentiate in (jax.grad(loss), lambda x, f=loss: jax.jvp(f, (x,), (x,))):
      with pytest.raises(NotImplementedError, match="kernels_pallas.expert_ffn"):
        differentiate(arguments[0])


def test_within_a_checked_shard_map():
  args = operands(T=8)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharded = jax.shard_map(
    fused_moe,
    mesh=mesh,
    in_specs=(P("data"), P(), P(), P("data"), P("data")),
    out_specs=P("data"),
    check_vma=True,
  )
  assert_close(jax.jit(sharded)(*args), reference(*args), 1e-5)


def test_bad_input():
  x, gate_up, down, weights, experts = operands()
  with pytest.raises(ValueError, match=r"gate_up \[E, D, 2F\]"):
    fused_moe(x, gate_up[:, :-1], down, weights, experts)
  with pytest.raises(ValueError, match=r"experts \[20, k\], got \(20, 2\) and \(20, 1\)"):
    fused_moe(x, gate_up, down, weights, experts[:, :1])
  with pytest.raises(ValueError, match="integers, got float32"):
    fused_moe(x, gate_up, down, weights, weights)
  with pytest.raises(ValueError, match="dtype of x, float32, got bfloat16"):
    fused_moe(x, gate_up.astype(jnp.bfloat16), down, weights, experts)
  with pytest.raises(ValueError, match="unknown implementation 'triton'"):
    fused_moe(x, gate_up, down, weights, experts, implementation="triton")
  for name, platform in (("pallas_tpu", "tpu"), ("pallas_gpu", "cuda")):
    with pytest.raises(ValueError, match=f"'{name}' runs on {platform} only"):
      jax.jit(functools.partial(fused_moe, implementation=name))(x, gate_up, down, weights, experts)
  with pytest.raises(ValueError, match="float8_e4m3fn, int8, got int4"):
    quantize(gate_up, down, jnp.int4)
  with pytest.raises(ValueError, match=r"\[E, I, O\], got shape \(16, 32\)"):
    quantize(gate_up[0], down, jnp.int8)
  stored, _ = quantize(gate_up, down, jnp.int8)
  wrong = QuantizedExperts(values=stored.values, scales=stored.scales[:, :-1])
  with pytest.raises(ValueError, match=r"scales of gate_up \(6, 32\), got \(6, 31\)"):
    fused_moe(x, wrong, down, weights, experts)
  huge = [jax.ShapeDtypeStruct((2**24, *w.shape[1:]), w.dtype) for w in (gate_up, down)]
  with pytest.raises(ValueError, match=r"up to 2\*\*31 weights, got gate_up \(16777216, 16, 32\)"):
    jax.eval_shape(pallas_gpu.forward, x, *huge, weights, experts)
  many = jnp.zeros((4096, 2048))
  with pytest.raises(ValueError, match="4096 tokens of width 2048 need .*expert_ffn for many"):
    experts = jnp.zeros((4096, 1), jnp.int32)
    pallas_tpu.forward(many, jnp.zeros((1, 2048, 256)), jnp.zeros((1, 128, 2048)), experts, experts)


def test_no_tokens_and_the_reference_by_name():
  args = operands(T=0)
  assert fused_moe(*args).shape == (0, 16)
  args = operands(T=5)
  named = jax.jit(functools.partial(fused_moe, implementation="reference"))
  np.testing.assert_array_equal(named(*args), reference(*args))
