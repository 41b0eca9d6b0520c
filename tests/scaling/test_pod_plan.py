"""The real train step compiled by libtpu for a small slice that is not here, and what it costs."""

import dataclasses

import pytest

from lladax.config import ConfigError
from lladax.data import DataConfig
from lladax.experiment import Experiment
from lladax.models import tiny
from lladax.moe import MoEConfig
from lladax.plan import arranged
from lladax.scaling import aot, report
from lladax.scaling import sweep as sweep_module
from lladax.scaling.chips import parse_slice
from lladax.scaling.collectives import LATER_PART
from lladax.scaling.decode import plan_decoding
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
def test_decoding(slice_):
  config, _ = arranged(SMALL, slice_, "tensor=2,expert=2", "Fsdp")
  config = dataclasses.replace(
    config, sampler=dataclasses.replace(config.sampler, gen_length=64, steps=64, block_length=32)
  )
  prefill, block = plan_decoding(config, slice_, batches=(1,), prompt=64)
  assert (prefill.width, block.width) == (128, 32)
  assert block.cache_bytes > 0 == prefill.cache_bytes
  assert block.seconds[0] < prefill.seconds[1]
  assert prefill.plan.memory.fits
