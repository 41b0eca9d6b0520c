"""The real train step compiled by libtpu for a small slice that is not here, and what it costs."""

import dataclasses

import pytest

from lladax.config import ConfigError
from lladax.data import DataConfig
from lladax.experiment import Experiment
from lladax.models import tiny
from lladax.moe import MoEConfig
from lladax.plan import arranged
from lladax.scaling import aot, decode, report
from lladax.scaling import sweep as sweep_module
from lladax.scaling.chips import parse_slice
from lladax.scaling.collectives import LATER_PART
from lladax.scaling.plan import plan_training
from lladax.train import Constant, OptimizerConfig

try:
  aot.require_libtpu()
  missing = ""
except ConfigError as error:
  missing = str(error)
pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

SMALL = Experiment(
  name="small",
  # Short rows: the gradient of attention computes its scores again, which is no waste to find here.
  model=tiny(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=2,
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, expert_intermediate_size=256),
    dtype="bfloat16",
    remat="full",
  ),
  data=DataConfig(length=128, batch_size=64),
  optimizer=OptimizerConfig(schedule=Constant(warmup=1)),
)


@pytest.fixture(autouse=True)
def checked_values():
  """In place of the check of all tests: kernels are compiled as they run, and that is unchecked."""


@pytest.fixture(scope="module")
def slice_():
  return parse_slice("v5e:2x2")


@pytest.fixture(scope="module")
def plan(slice_):
  config, _ = arranged(SMALL, slice_, "fsdp=2,expert=2", "Fsdp")
  return plan_training(config, slice_)


@pytest.mark.slow
def test_it_fits_and_holds_its_share_of_the_state(plan):
  memory = plan.memory
  assert memory.fits and plan.cost is not None
  # Two moments of every parameter, a quarter of all on each of four devices, and little whole.
  assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=0.01)
  assert 0 < memory.temporaries < 0.25 * memory.available
  assert memory.peak <= memory.needed <= memory.available


@pytest.mark.slow
def test_forward_and_backward_compute_what_is_useful_and_no_more(plan):
  # A grouped product that is expanded over all experts would compute four times as much.
  once = plan.cost.flops - report.recomputed(plan)
  assert once == pytest.approx(plan.useful_flops, rel=0.10)
  assert report.recomputed(plan) < 0.4 * plan.useful_flops
  assert not plan.cost.unknown_calls
  assert not plan.unknown_loops


@pytest.mark.slow
def test_no_whole_slice_all_reduce_and_little_more_than_the_least_traffic(plan):
  assert not plan.whole_slice
  moved = sum(collective.total_bytes for collective in plan.collectives)
  least = sum(need.bytes for need in plan.least)
  assert 0.9 * least < moved < 1.5 * least
  kinds = {(c.kind, c.axes) for c in plan.collectives}
  assert ("all-gather", ("fsdp",)) in kinds
  assert ("all-gather", ("expert",)) in kinds
  assert LATER_PART.search(plan.text) is None or "async_collective_fusion" in plan.text


@pytest.mark.slow
def test_text_json_and_table(plan):
  text = report.text(plan, tokens=1e12, title="small")
  for part in ("small on v5e:2x2", "fsdp=2,expert=2", "parameters", "all-gather", "MFU", "days"):
    assert part in text
  found = report.to_dict(plan, tokens=1e12)
  assert found["memory_bytes"]["fits"]
  assert found["seconds"]["overlapped"] <= found["seconds"]["serial"]
  assert found["days"]["overlapped"] > 0
  assert report.markdown([report.row("small", plan, 2)]).count("\n") == 2


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(slice_, capsys):
  # 1.5e9 parameters of 12 bytes on one chip: 18 GB of 16.
  model = dataclasses.replace(SMALL.model, num_hidden_layers=2, hidden_size=1024,
                              moe=MoEConfig(num_experts=64, num_experts_per_tok=2,
                                            expert_intermediate_size=4096))  # fmt: skip
  config = dataclasses.replace(SMALL, model=model, data=DataConfig(length=128, batch_size=8))
  one = parse_slice("v5e:2x2")
  config, _ = arranged(config, one, "data=4", "Fsdp")
  plan = plan_training(config, one)
  assert not plan.memory.fits
  assert plan.cost is None
  text = report.text(plan)
  assert "It does not fit" in text
  assert "--mesh fsdp=4" in text
  assert "--topology=v5e:2x4" in text


@pytest.mark.slow
def test_a_sweep_names_the_best(plan, slice_, monkeypatch):
  # Without compiling: links as slow as the mesh is uneven, and one that is refused.
  def planned(config, _):
    if config.mesh.expert == 4:
      raise ConfigError("refused here")
    links = config.mesh.fsdp / config.mesh.expert
    return dataclasses.replace(
      plan,
      mesh_sizes={"fsdp": config.mesh.fsdp, "expert": config.mesh.expert},
      roofline=dataclasses.replace(plan.roofline, links=links),
    )

  monkeypatch.setattr(sweep_module, "plan_training", planned)
  said = []
  tried = sweep_module.sweep(SMALL, slice_, report=said.append)
  assert said[0].startswith(f"1 of {len(tried)}")
  planned_first = [t.plan.roofline.links for t in tried if t.plan]
  assert planned_first == sorted(planned_first)
  assert tried[0].config.mesh.expert == 2
  assert tried[-1].refused == "refused here"
  assert len(sweep_module.sweep(SMALL, slice_, limit=2)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8"])
def test_decoding(slice_, weights):
  # Wide enough that nothing but weights counts, and memory.
  model = dataclasses.replace(
    SMALL.model,
    hidden_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    moe=MoEConfig(num_experts=32, num_experts_per_tok=4, expert_intermediate_size=1024),
  )
  sampler = dataclasses.replace(SMALL.sampler, gen_length=256, steps=256, block_length=32)
  config, _ = arranged(
    dataclasses.replace(SMALL, model=model, sampler=sampler), slice_, "tensor=2,expert=2", "Fsdp"
  )
  prefill, block = decode.plan_decoding(config, slice_, rows=(1,), prompt=256, weights=weights)
  assert (prefill.width, block.width) == (512, 32)
  assert (prefill.plan.exchange, block.plan.exchange) == ("Ring", "Ring")
  # Keys and values of 2 layers, 512 columns, 8 heads of 128, in bfloat16, the heads on 2.
  assert prefill.memory_bytes == block.memory_bytes == 2 * 2 * 512 * 8 * 128 * 2 / 2
  assert block.plan.memory.batch >= block.memory_bytes > 0
  # Experts choose 4 of 32 for 32 tokens: 1.4 % of them are not read.
  item = 1 if weights else 2
  experts = (1 - (7 / 8) ** 32) * 2 * 32 * 3 * 1024 * 1024 * item / 4
  # One row lies on all devices, whose weights then stay where they are.
  attention, head = 2 * 4 * 1024 * 1024 * 2 / 4, 1024 * 2048 * 2 / 4
  own = experts + attention + head + block.memory_bytes
  print(f"needed {block.needed_bytes / own:.3f}, read off {block.plan.cost.hbm_bytes / own:.3f}")
  assert block.needed_bytes == pytest.approx(own, rel=0.02)
  # The compiler fetches some experts before it is known that nobody wants them.
  assert own < block.plan.cost.hbm_bytes < 1.1 * own
  # New columns travel, what is kept of the others does not.
  assert max(each.size for each in block.plan.collectives) < block.memory_bytes / 8
  assert block.floor <= block.seconds[0] <= block.seconds[1] < prefill.seconds[1]
  for each in (prefill, block):
    assert each.plan.memory.fits and not each.plan.cost.unknown_calls
    assert each.plan.cost.flops > each.plan.useful_flops > 0
  assert [line["pass"] for line in decode.to_dict([prefill, block])] == ["prefill", "block step"]
  assert "x floor" in decode.text([prefill, block], config)
