"""How tokens and experts meet on a mesh: one exchange strategy under one `shard_map`."""

from __future__ import annotations

import abc
import dataclasses

import jax

from kernels_pallas.expert_ffn import expert_ffn
from lladax.moe.dispatch import make_plan
from lladax.sharding import over_batch_shards


class Exchange(abc.ABC):
  """(x [T, D], weights [T, k], experts [T, k], gate_up, down) -> y [T, D], dropless."""

  @abc.abstractmethod
  def __call__(self, x, weights, experts, gate_up, down, *, implementation=None) -> jax.Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fsdp(Exchange):
  """Tokens stay where they are; the experts' weights are gathered for the layer.

  Exact on any mesh, no imbalance between devices, nothing dropped. Each device sorts and computes
  its own tokens.
  """

  def __call__(self, x, weights, experts, gate_up, down, *, implementation=None):
    def local(x, weights, experts, gate_up, down):
      plan = make_plan(experts, down.shape[0])
      return expert_ffn(
        x,
        gate_up,
        down,
        weights,
        plan.order,
        plan.inverse,
        plan.group_sizes,
        implementation=implementation,
      )

    return over_batch_shards(local, sharded=(True, True, True, False, False))(
      x, weights, experts, gate_up, down
    )
