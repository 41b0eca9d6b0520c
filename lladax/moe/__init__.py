"""Routing, dispatch and expert weights of the mixture of experts."""

from lladax.moe.dispatch import Plan, make_plan
from lladax.moe.expert_parallel import Exchange, Fsdp
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
  "Exchange",
  "Fsdp",
  "MoEConfig",
  "MoELayer",
  "Plan",
  "Router",
  "RouterStats",
  "Routing",
  "SigmoidBias",
  "TopKSoftmax",
  "make_plan",
  "router_stats",
]
