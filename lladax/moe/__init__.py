"""Routing, dispatch and expert weights of the mixture of experts."""

from lladax.moe.dispatch import Plan, make_plan
from lladax.moe.expert_parallel import AllToAll, Exchange, Experts, Fsdp, Ragged, Ring
from lladax.moe.layer import MoEConfig, MoELayer
from lladax.moe.router import (
  Router,
  RouterStats,
  Routing,
  SigmoidBias,
  TopKSoftmax,
  router_stats,
)

__all__ = [
  "AllToAll",
  "Exchange",
  "Experts",
  "Fsdp",
  "MoEConfig",
  "MoELayer",
  "Plan",
  "Ragged",
  "Ring",
  "Router",
  "RouterStats",
  "Routing",
  "SigmoidBias",
  "TopKSoftmax",
  "make_plan",
  "router_stats",
]
