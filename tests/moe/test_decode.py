"""The layer as it decodes: few tokens, experts in place on a mesh, weights in eight bits."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import op
from kernels_pallas.fused_moe import QuantizedExperts, api, is_faster, quantize
from lladax.moe import AllToAll, Exchange, Fsdp, MoEConfig, MoELayer, Ragged, Ring
from lladax.moe import local as moe_local
from lladax.sharding import MeshConfig, make_mesh, param_shardings, partition, use_mesh

B, L, D, E, F = 8, 4, 8, 8, 4
CONFIG = MoEConfig(num_experts=E, num_experts_per_tok=3, expert_intermediate_size=F)
FUSED = dataclasses.replace(CONFIG, implementation="fused_moe")
# By NumPy: whatever is compiled here, every process that collects the tests compiles.
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((B, L, D)) + 1, jnp.float32)


def boxed(config=CONFIG):
  return MoELayer(config).init(jax.random.key(0), X)["params"]


SHAPES = {"router": (D, E), "gate_up": (E, D, 2 * F), "down": (E, F, D)}
PARAMS = {n: jnp.asarray(RNG.normal(0, 0.7, shape), jnp.float32) for n, shape in SHAPES.items()}


def quantized(params, dtype=jnp.int8):
  gate_up, down = quantize(params["gate_up"], params["down"], dtype)
  return params | {"gate_up": gate_up, "down": down}


def dequantized(params):
  return {
    name: leaf.dequantize() if isinstance(leaf, QuantizedExperts) else leaf
    for name, leaf in params.items()
  }


@functools.partial(jax.jit, static_argnums=0)
def layer(config, params, x):
  return MoELayer(config).apply({"params": params}, x)


def place(mesh, config, params, x):
  """The operands as they lie on a mesh, scales on one device."""
  shardings = param_shardings(mesh, jax.eval_shape(functools.partial(boxed, config)))

  def put(leaf, to):
    if isinstance(leaf, QuantizedExperts):
      return dataclasses.replace(leaf, values=jax.device_put(leaf.values, to))
    return jax.device_put(leaf, to)

  placed = {name: put(params[name], shardings[name]) for name in params}
  lies = partition(mesh, x.shape, ("batch", "length", None))
  return placed, jax.device_put(x, jax.sharding.NamedSharding(mesh, lies))


def on_mesh(config, mesh_config, params, x):
  with use_mesh(make_mesh(mesh_config)) as mesh:
    return layer(config, *place(mesh, config, params, x))


def assert_close(got, want, rtol=1e-5):
  def compare(a, b):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))

  jax.tree.map(compare, got, want)


def test_the_same_layer_by_the_op_for_few_tokens():
  config = dataclasses.replace(CONFIG, implementation="inference")
  assert_close(layer(config, PARAMS, X), layer(CONFIG, PARAMS, X))


def test_few_tokens_take_the_one_op_and_many_the_other():
  """Up to so many slots per expert; more where weights would have to be converted."""
  for tokens, k, few, few_converted in (
    (1, 3, True, True),
    (E * api.FEW, 1, True, True),
    (E * api.FEW + 1, 1, False, True),
    (E * api.FEW, 2, False, True),
    (E * api.FEW_CONVERTED + 1, 1, False, False),
  ):
    x, weights = jnp.zeros((tokens, D)), jnp.zeros((tokens, k))
    for down, expected in ((PARAMS["down"], few), (quantized(PARAMS)["down"], few_converted)):
      assert moe_local.takes_fused("inference", x, weights, down) == expected
      assert moe_local.takes_fused("fused_moe", x, weights, down)
      for other in (None, "live_blocks", "ragged_dot"):
        assert not moe_local.takes_fused(other, x, weights, down)
    low = x.astype(jnp.bfloat16)
    assert moe_local.takes_fused("inference", low, weights, PARAMS["down"]) == few_converted


def test_a_kernel_with_room_for_few_tokens_is_not_asked_for_many():
  down = jax.ShapeDtypeStruct((64, 8, 8), jnp.bfloat16)
  with op.target("TPU v5"):
    for tokens, few in ((256, True), (512, True), (513, False)):
      assert is_faster(tokens, 1, down, "bfloat16") == few
    # Eight bits have no other op that reads them as they are.
    low = quantized(PARAMS)["down"]
    assert not is_faster(512, E, PARAMS["down"], "bfloat16")
    assert is_faster(512, E, low, "bfloat16") and not is_faster(513, E, low, "bfloat16")


def test_slots_of_experts_elsewhere_do_not_count():
  own = jax.ShapeDtypeStruct((8, 4, 4), jnp.bfloat16)  # of 64
  with op.target("TPU v5"):
    assert not is_faster(64, 8, own, "bfloat16") and is_faster(64, 8, own, "bfloat16", devices=8)


def test_training_is_refused():
  with pytest.raises(NotImplementedError, match="kernels_pallas.expert_ffn"):
    jax.grad(lambda params: layer(FUSED, params, X)[0].sum())(PARAMS)


def test_a_token_is_computed_alike_alone_and_among_others():
  """To the last bit, of the experts' part; the router's product is XLA's."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(20, D)), jnp.float32)
  experts = jnp.asarray(np.argsort(rng.normal(size=(20, E)))[:, :3], jnp.int32)
  weights = jnp.asarray(rng.random((20, 3)), jnp.float32)

  @jax.jit
  def own(x, weights, experts):
    matrices = PARAMS["gate_up"], PARAMS["down"]
    return moe_local.compute_own(x, weights, experts, *matrices, "fused_moe")

  together = own(x, weights, experts)
  for rows in ([3], [17]):
    rows = np.array(rows)
    np.testing.assert_array_equal(own(x[rows], weights[rows], experts[rows]), together[rows])


MESHES = (MeshConfig(data=2, expert=2, tensor=2), MeshConfig(fsdp=2, expert=4))


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "exchange, mesh",
  [
    (Fsdp(), MESHES[0]),
    (Ring(), MESHES[0]),
    *(slow(exchange, mesh) for exchange in (AllToAll(), Ragged()) for mesh in MESHES),
    *(slow(exchange, MESHES[1]) for exchange in (Fsdp(), Ring())),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, Exchange) else str(value),
)
def test_a_mesh_equals_one_device_in_eight_bits_as_well(exchange, mesh):
  config = dataclasses.replace(FUSED, exchange=exchange)
  want = layer(CONFIG, dequantized(quantized(PARAMS)), X)
  assert_close(on_mesh(config, mesh, quantized(PARAMS), X), want)


@pytest.mark.slow
@pytest.mark.parametrize(
  "exchange", [Fsdp(), Ring(), AllToAll(), Ragged()], ids=lambda e: type(e).__name__
)
def test_a_single_row_on_a_mesh(exchange):
  config = dataclasses.replace(FUSED, exchange=exchange)
  got = on_mesh(config, MeshConfig(expert=4, tensor=2), PARAMS, X[:1, :3])
  assert_close(got, layer(CONFIG, PARAMS, X[:1, :3]))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [Ring(), AllToAll(), Ragged()], ids=lambda e: type(e).__name__)
def test_slots_without_room_stay_uncomputed_by_either_op(exchange):
  exchange = dataclasses.replace(exchange, buffer_factor=1.0, on_overflow="drop")
  params = PARAMS | {"router": PARAMS["router"] + 2.0 * jnp.arange(E) / D}
  configs = [dataclasses.replace(config, exchange=exchange) for config in (CONFIG, FUSED)]
  want, got = (on_mesh(config, MESHES[0], params, X) for config in configs)
  assert want[1].dropped > 0
  assert_close(got, want)


@pytest.mark.parametrize("implementation", ["fused_moe", None])
def test_either_op_takes_eight_bits(implementation):
  config, params = (
    dataclasses.replace(CONFIG, implementation=implementation),
    quantized(PARAMS, jnp.float8_e4m3fn),
  )
  assert_close(layer(config, params, X), layer(CONFIG, dequantized(params), X))


def test_quantised_weights_of_another_config():
  other = dataclasses.replace(CONFIG, expert_intermediate_size=F + 1)
  with pytest.raises(ValueError, match=r"gate_up has values \(8, 8, 8\) .* has \(8, 8, 10\)"):
    layer(other, quantized(PARAMS), X)


def collectives(config, mesh_config, x) -> dict[str, int]:
  """Numbers that each kind of collective gives a device, in all."""
  with use_mesh(make_mesh(mesh_config)) as mesh:
    text = layer.lower(config, *place(mesh, config, PARAMS, x)).compile().as_text()
  found = {}
  for shape, name in re.findall(r"= [a-z0-9]+\[([\d,]*)\]\S* (all-\w+|reduce-scatter)\(", text):
    size = math.prod(int(n) for n in shape.split(",") if n)
    found[name] = found.get(name, 0) + size
  return found


def test_what_moves_when_a_row_is_decoded_on_experts_in_place():
  """The sum over devices and no weights; `Fsdp` gathers what lies on several devices of them."""
  row = X[:1]
  ring = dataclasses.replace(FUSED, exchange=Ring())
  assert collectives(ring, MeshConfig(expert=8), row) == {"all-reduce": L * D}
  fsdp = collectives(FUSED, MeshConfig(expert=4, fsdp=2), row)
  assert fsdp["all-gather"] >= E * 3 * D * F


def test_rows_of_their_own_move_as_much():
  """Tokens, weights and experts of all are gathered, the sums scattered."""
  ring = dataclasses.replace(FUSED, exchange=Ring())
  moved = collectives(ring, MeshConfig(expert=8), X)
  k = CONFIG.num_experts_per_tok
  assert moved["all-gather"] == B * L * (D + 2 * k)
  assert moved["reduce-scatter"] == B * L * D // 8
  assert set(moved) <= {"all-gather", "reduce-scatter", "all-reduce"}  # the last: statistics
