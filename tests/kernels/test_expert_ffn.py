"""Every implementation of the experts' layer against the dense one-hot reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import op
from kernels_pallas.expert_ffn import IMPLEMENTATIONS, expert_ffn
from kernels_pallas.expert_ffn.reference import expert_ffn as reference


def operands(T=96, D=8, E=4, F=6, k=2, skew=0.0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(1), 6)
  x = jax.random.normal(keys[0], (T, D), dtype)
  gate_up = jax.random.normal(keys[1], (E, D, 2 * F), dtype)
  down = jax.random.normal(keys[2], (E, F, D), dtype)
  logits = jax.random.normal(keys[3], (T, E)) + skew * jnp.arange(E)
  weights, experts = jax.lax.top_k(jax.nn.softmax(logits), k)
  grad = jax.random.normal(keys[4], (T, D), dtype)
  return x, gate_up, down, weights, experts.astype(jnp.int32), grad


def plan(experts, E):
  flat = experts.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  return order, jnp.argsort(order), jnp.bincount(flat, length=E)


@pytest.mark.parametrize(
  "shape",
  [
    dict(),
    dict(skew=50.0),  # two experts take everything, the others are empty
    dict(E=2, k=2),  # all experts active
    dict(T=700, E=3, k=1),  # groups larger than a block, ragged tails
    dict(T=1, E=8, k=1),
  ],
  ids=str,
)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_values_and_gradients_equal_the_dense_reference(implementation, shape):
  *args, experts, grad = operands(**shape)
  sorted_slots = plan(experts, args[1].shape[0])

  def run(f):
    out, vjp = jax.vjp(f, *args)
    return out, *vjp(grad)

  got = jax.jit(
    lambda: run(lambda *a: expert_ffn(*a, *sorted_slots, implementation=implementation))
  )()
  want = run(lambda *a: reference(*a, experts))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max() + 1e-6))


def test_bfloat16_stays_near_float32():
  *args, experts, _ = operands(T=128, D=64, F=32)
  sorted_slots = plan(experts, 4)
  exact = expert_ffn(*args, *sorted_slots)
  low = [x.astype(jnp.bfloat16) for x in args[:3]]
  for implementation in IMPLEMENTATIONS:
    got = expert_ffn(*low, args[3], *sorted_slots, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    error = jnp.abs(got.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
    assert error < 0.03


def test_shapes_that_do_not_fit():
  *args, experts, _ = operands()
  order, inverse, sizes = plan(experts, 4)
  with pytest.raises(ValueError, match=r"gate_up \[E, D, 2F\]"):
    expert_ffn(args[0], args[1][:, :-1], *args[2:], order, inverse, sizes)
  with pytest.raises(ValueError, match=r"order \[R\] and inverse \[192\]"):
    expert_ffn(*args, order, inverse[:-1], sizes)
  with pytest.raises(ValueError, match="unknown implementation 'cuda'.*live_blocks"):
    expert_ffn(*args, order, inverse, sizes, implementation="cuda")


def part_of_plan(experts, first, count, room):
  """Slots of experts first to first + count, with room for more: what one of several devices does."""
  flat = experts.reshape(-1) - first
  here = (flat >= 0) & (flat < count)
  order = jnp.argsort(jnp.where(here, flat, count), stable=True)
  place = jnp.argsort(order)
  live = here.sum()
  order = jnp.where(jnp.arange(flat.size) < live, order, flat.size)
  inverse = jnp.where(here, place, np.iinfo(np.int32).max)
  sizes = jnp.bincount(jnp.where(here, flat, count), length=count + 1)[:count]
  return (
    jnp.pad(order[:room], (0, max(0, room - flat.size)), constant_values=flat.size),
    inverse,
    sizes,
  )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_in_two_places_add_up_to_all_of_them(implementation):
  *args, experts, grad = operands(T=50, E=6, skew=0.5)

  def run(f):
    out, vjp = jax.vjp(f, *args)
    return out, *vjp(grad)

  def parts(x, gate_up, down, weights):
    total = 0
    for first, count, room in ((0, 2, 130), (2, 4, 100)):
      own = slice(first, first + count)
      plan = part_of_plan(experts, first, count, room)
      total += expert_ffn(x, gate_up[own], down[own], weights, *plan, implementation=implementation)
    return total

  for a, b in zip(run(parts), run(lambda *some: reference(*some, experts)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
  "implementation",
  ["ragged_dot"]
  + [pytest.param(name, marks=pytest.mark.slow) for name in ("pallas_tpu", "triton")],
)
def test_the_form_for_accelerators_runs_on_the_products_that_are_named(implementation):
  """Rows of whole lanes, so that the TPU's are stored as they are copied."""
  *args, experts, grad = operands(T=24, D=256, E=3, F=128)
  args[3] = args[3] / args[3].max()
  sorted_slots = plan(experts, 3)

  def run(f):
    out, vjp = jax.vjp(f, *args)
    return out, *vjp(grad)

  with op.interpret():
    got = jax.jit(
      lambda: run(lambda *a: expert_ffn(*a, *sorted_slots, implementation=implementation))
    )()
  want = run(lambda *a: reference(*a, experts))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
