"""The choice of an implementation, the target it is made for, and the table of tilings."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import op


def choose(x):
  return op.by_platform(x, cpu=jnp.sin, tpu=jnp.cos, cuda=jnp.tan)


def lowered(f, platform):
  return jax.jit(f).trace(jnp.ones(())).lower(lowering_platforms=(platform,)).as_text()


def test_the_branch_is_that_of_the_platform_lowered_for():
  assert "sine" in lowered(choose, "cpu")
  with op.target("TPU v5"):
    assert "cosine" in lowered(choose, "tpu")
    assert "sine" in lowered(choose, "cpu")  # hosts of TPUs are CPUs
  with op.target("NVIDIA H100 80GB HBM3"):
    assert "tan" in lowered(choose, "cuda")


def test_a_branch_that_cannot_be_meant_is_not_traced():
  def fails(x):
    raise AssertionError

  assert op.by_platform(jnp.ones(()), cpu=jnp.sin, tpu=fails, cuda=fails) == jnp.sin(1.0)
  with op.target("TPU v5"), pytest.raises(AssertionError):
    jax.make_jaxpr(lambda x: op.by_platform(x, cpu=jnp.sin, tpu=fails, cuda=jnp.sin))(1.0)


def test_what_was_traced_for_a_cpu_is_not_lowered_for_a_tpu():
  with pytest.raises(ValueError, match=r"lowered for tpu.*op\.target"):
    lowered(choose, "tpu")
  with op.target("TPU v5"), pytest.raises(Exception, match="cuda"):
    lowered(choose, "cuda")


def test_another_target_is_another_trace():
  function = jax.jit(choose)
  assert "sine" in function.lower(jnp.ones(())).as_text()
  with op.target("TPU v5"):
    text = function.trace(jnp.ones(())).lower(lowering_platforms=("tpu",)).as_text()
  assert "cosine" in text


def test_the_choice_is_transparent_to_transformations():
  mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
  x = jnp.linspace(0.0, 1.0, 8)
  assert jnp.array_equal(jax.vmap(choose)(x), jnp.sin(x))
  assert jnp.allclose(jax.vmap(jax.grad(jax.checkpoint(choose)))(x), jnp.cos(x))
  for check in (True, False):
    spread = jax.shard_map(choose, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=check)
    total = jax.jit(jax.value_and_grad(lambda x, f=spread: f(x).sum()))
    assert jnp.allclose(total(x)[1], jnp.cos(x))


def test_a_kernel_asked_for_by_name_says_where_it_runs():
  def kernel(x):
    return op.only_on("tpu", "some_kernel", jnp.sin, x)

  for run in (kernel, jax.jit(kernel)):
    with pytest.raises(ValueError, match="'some_kernel' runs on tpu only.*for cpu.*interpret"):
      run(jnp.ones(()))
  assert "sine" in lowered(kernel, "tpu")
  with op.interpret():
    assert kernel(jnp.ones(())) == jnp.sin(1.0)


def test_a_target_needs_a_name_of_a_device():
  with pytest.raises(ValueError, match="'v5p'.*'TPU v5'"), op.target("v5p"):
    pass


def test_targets_nest_and_end():
  assert op.target_platform() == "cpu"
  with op.target("TPU v5 lite"):
    assert op.chip().vmem == 128 << 20
    with op.target("TPU v5"):
      assert (op.target_platform(), op.chip().cores) == ("tpu", 2)
    assert op.target_device_kind() == "TPU v5 lite"
  assert op.target_device_kind() == jax.devices()[0].device_kind


def test_tuned_tilings_are_kept_by_device_kind(tmp_path, monkeypatch):
  monkeypatch.setenv("LLADAX_CACHE", str(tmp_path))
  op.table.cache_clear()
  tiling, key = op.Tiling(rows=256, columns=512, step=128), ("some_op", (1000, 4, 64), jnp.bfloat16)
  with op.target("TPU v5"):
    assert op.tuned(*key) is None
    op.save("TPU v5", {op.table_key(*key): tiling})
    op.save("TPU v5", {"another": op.Tiling(rows=8, columns=8)})
    assert op.tuned(*key) == tiling
    assert op.tuned("some_op", (1024, 4, 64), "bfloat16") == tiling  # rows to a power of two
    assert op.tuned("some_op", (1025, 4, 64), "bfloat16") is None
  with op.target("TPU v6 lite"):
    assert op.tuned(*key) is None
  assert len(json.loads(op.table_path("TPU v5").read_text())) == 2

  for text, what in (
    (json.dumps({op.table_key(*key): {"lines": 3}}), "lines"),
    ("[", "not a table"),
  ):
    op.table_path("TPU v5").write_text(text)
    op.table.cache_clear()
    with op.target("TPU v5"), pytest.raises(ValueError, match=rf"tpu_v5\.json.*{what}.*delete"):
      op.tuned(*key)
  op.table.cache_clear()


@pytest.mark.parametrize("fields", [dict(rows=0, columns=8), dict(rows=100, columns=8, step=64)])
def test_tilings_that_make_no_sense(fields):
  with pytest.raises(ValueError, match="rows"):
    op.Tiling(**fields)
