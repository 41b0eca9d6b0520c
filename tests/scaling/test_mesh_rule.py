"""The rule for exchange and mesh, slices, and the least traffic."""

import dataclasses
import math

import jax
import pytest

from lladax.models import llada2_flash, llada_moe_7b_a1b, tiny
from lladax.moe import MoEConfig
from lladax.scaling import mesh_rule
from lladax.scaling.chips import CHIPS, Slice, describe, exists, larger_slices, parse_slice
from lladax.scaling.least import least_traffic
from lladax.scaling.memory import Memory, Situation, describe_remedies, remedies
from lladax.scaling.roofline import days, roofline
from lladax.sharding import MeshConfig, make_mesh, named_sharding


@pytest.mark.quick
@pytest.mark.parametrize(
  "name, tokens",
  [("v5e:16x16", 5.2e3), ("v5p:4x4x4", 4.1e3), ("v6e:16x16", 12.2e3), ("tpu7x:4x4x4", 20.5e3)],
)
def test_tokens_that_hide_the_gather_of_the_7b(name, tokens):
  # W / (links x speed) = T x operations of a layer / peak, by hand.
  found = mesh_rule.tokens_to_hide_gather(llada_moe_7b_a1b(), parse_slice(name), 4096)
  assert found == pytest.approx(tokens, rel=0.02)


def test_many_tokens_gather_weights_and_few_go_round_a_ring():
  model, slice_ = llada_moe_7b_a1b(), parse_slice("v5p:4x4x4")
  assert mesh_rule.choices(model, slice_, 4096, 16_384)[0].exchange == "Fsdp"
  few = mesh_rule.choices(model, slice_, 4096, 2048)[0]
  assert (few.exchange, few.expert) == ("Ring", 4)


def test_every_choice_fits_the_torus_and_what_cannot_be_says_why():
  for name in ("v5e:8x8", "v5p:4x8x8", "v6e:4x8", "tpu7x:4x4x4"):
    slice_ = parse_slice(name)
    found = mesh_rule.choices(llada2_flash(), slice_, 4096, 4096)
    assert {choice.fsdp * choice.expert for choice in found} == {slice_.devices}
    ragged = [choice for choice in found if choice.exchange == "Ragged"]
    assert all(("v5e" in choice.excluded) == (name == "v5e:8x8") for choice in ragged)
  small = dataclasses.replace(
    llada_moe_7b_a1b(),
    moe=MoEConfig(num_experts=6, num_experts_per_tok=2, expert_intermediate_size=96),
  )
  found = mesh_rule.choices(small, parse_slice("v5p:4x4x4"), 4096, 64)
  assert all("6 experts" in c.excluded for c in found if c.exchange == "Ring")


@pytest.mark.quick
def test_slices():
  assert parse_slice("v5p:4x4x4").devices == 64
  assert parse_slice("tpu7x:2x2x1").devices == 8
  assert [s.name for s in larger_slices(parse_slice("v5p:4x4x4"))] == ["v5p:4x4x8", "v5p:4x8x8"]
  assert [s.name for s in larger_slices(parse_slice("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
  assert larger_slices(parse_slice("v6e:16x16")) == []
  for chip in CHIPS.values():
    assert all(exists(chip, dims) for dims in chip.slices)


@pytest.mark.parametrize(
  "text, part",
  [
    ("v5:2x2", "v5e, v5p, v6e, tpu7x"),
    ("v5p:4x4", "2x2x1, 2x2x2"),
    ("v5e:3x3", "1x1, 2x2, 2x4"),
    ("v5p:8x4x4", "ascending"),
    ("v5p:4x4x400", "16x16x24"),
    ("v6e", "1x1"),
    ("v6e:axb", "1x1"),
  ],
)
def test_a_slice_that_does_not_exist_lists_those_that_do(text, part):
  with pytest.raises(ValueError, match="there is no") as error:
    parse_slice(text)
  assert part in str(error.value)
  assert "\n" not in str(error.value)
  assert describe(CHIPS["v5e"]).startswith("1x1")


# --- The least traffic ---


def least(model, names, sizes, **options):
  """Needs of one weight [64, 32] whose axes carry these logical names."""
  mesh = make_mesh(MeshConfig(**sizes), devices=jax.devices()[: math.prod(sizes.values())])
  spec = named_sharding(mesh).spec
  sharding = jax.sharding.NamedSharding(mesh, type(spec)(*names))
  leaf = jax.ShapeDtypeStruct((3, 64, 32), "float32", sharding=sharding)
  found = least_traffic(
    model, {"layers": {"moe": {"gate_up": leaf}}}, dict(mesh.shape), 1000, **options
  )
  return {(need.kind, need.axes, need.purpose): need.bytes for need in found}


def test_a_weight_is_gathered_twice_and_its_gradient_scattered_once():
  model = tiny(dtype="bfloat16", remat="full")
  found = least(model, (None, "fsdp", None), {"data": 2, "fsdp": 4})
  whole = 3 * 64 * 32 * 2
  assert found["all-gather", ("fsdp",), "weights, forward"] == 3 / 4 * whole
  assert found["all-gather", ("fsdp",), "weights, recomputation"] == 3 / 4 * whole
  assert found["reduce-scatter", ("fsdp",), "gradients"] == 3 / 4 * whole
  # What is left on a device is then summed over the copies, there and back.
  assert found["all-reduce", ("data",), "gradients"] == 2 * 1 / 2 * whole / 4
  kept = least(
    dataclasses.replace(model, remat="none"), (None, "fsdp", None), {"data": 1, "fsdp": 4}
  )
  assert set(kept) == {
    ("all-gather", ("fsdp",), "weights, forward"),
    ("reduce-scatter", ("fsdp",), "gradients"),
  }


def test_tensor_parallel_weights_stay_and_activations_are_summed():
  model = tiny(dtype="bfloat16")
  found = least(model, (None, "tensor", None), {"data": 1, "tensor": 2}, supervised=0.5)
  state = 1000 * model.hidden_size * 2
  assert found == {
    ("all-reduce", ("tensor",), "activations"): 4 * model.num_hidden_layers * state,
    ("all-reduce", ("tensor",), "head"): 0.5 * state,
  }


# --- Memory and time ---


def situation(needed: float, **changes) -> Situation:
  gib = 1 << 30
  memory = Memory(
    parameters=gib, optimizer=2 * gib, batch=0, temporaries=(needed - 3) * gib, code=0,
    peak=needed * gib, needed=needed * gib, available=15.75 * gib,
  )  # fmt: skip
  values = {
    "memory": memory, "slice_": parse_slice("v5e:8x8"), "mesh_sizes": {"data": 2, "fsdp": 32},
    "fixed": 2 * gib, "saved": 9 * gib, "saved_least": 1 * gib, "rows": 8, "batch_size": 512,
    "microbatches": 1, "remat": "none",
  }  # fmt: skip
  return Situation(**values | changes)


def test_what_would_make_it_fit_is_computed():
  at = situation(20.0)
  found = {remedy.change.split(" (")[0]: remedy.needed / (1 << 30) for remedy in remedies(at)}
  assert found["--set model.remat=full"] == pytest.approx(12.0)
  # 15 GiB of activations halve; the sum of gradients comes on top.
  assert found["--set microbatches=2"] == pytest.approx(20 - 7.5 + 1)
  assert found["--mesh fsdp=64"] == pytest.approx(18.5)
  assert found["--set data.batch_size=256"] == pytest.approx(12.5)
  assert "--topology=v5e:8x16 with the same batch" in found
  lines = describe_remedies(at)
  assert "4.25 GiB too much" in lines[0]
  assert any("not enough alone" in line for line in lines[1:])
  assert any(line.endswith("fits") for line in lines[1:])
  bare = remedies(situation(20.0, remat="full", mesh_sizes={"fsdp": 64}, rows=1))
  assert [remedy.change.split("=")[0] for remedy in bare] == ["--topology"] * len(bare)


def test_time_is_between_the_slowest_part_and_the_sum():
  chip = Slice(CHIPS["v5e"], (2, 2)).chip
  found = roofline(chip, flops=197e12, hbm_bytes=819e9 / 2, link_seconds=0.25, useful_flops=98.5e12)
  assert (found.compute, found.hbm, found.links) == (1.0, 0.5, 0.25)
  assert (found.overlapped, found.serial, found.bound_by) == (1.0, 1.75, "compute")
  assert found.mfu(1.0) == 0.5
  assert days(8.64e9, 1e5, 1.0) == 1.0
