"""How evenly the experts are used: what a step sums of its routers, and what a record says of it.

By layer, and by layer and noise level: inputs that are nearly all MASK look alike, so routing
collapses there first, and a mean over all levels hides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lladax.types import Sums

# Sums of a step that a record gives a `summary` of. G groups of rows: buckets of t.
LOAD = "router_load"  # [n, G, E], `RouterStats.load`
ENTROPY = "router_entropies"  # [n, G]
SUMS = (LOAD, ENTROPY)


def router_metrics(stats, share: float, *, may_drop: bool) -> Sums:
  """What is recorded of the routers: load and entropy by layer and group, and dropped slots.

  Args:
    stats: `lladax.moe.RouterStats` of some rows of a batch, stacked over layers.
    share: these rows' part of the batch.
    may_drop: whether the exchange can drop slots; their number in the step is then recorded.
  """
  sums = {LOAD: stats.load, ENTROPY: stats.entropy}
  counts = {LOAD: stats.tokens[..., None], ENTROPY: stats.tokens}
  if may_drop:
    sums["dropped_slots"], counts["dropped_slots"] = stats.dropped.sum(), jnp.float32(share)
  return jax.lax.stop_gradient(Sums(sums, counts))


def router_load(metrics: Sums) -> jax.Array | None:
  """float32[n, E]: each expert's part of the slots of a step; None where nothing is routed."""
  if LOAD not in metrics.sums:
    return None
  load, tokens = metrics.sums[LOAD].sum(1), metrics.counts[LOAD].sum(1)  # [n, E], [n, 1]
  return load / jnp.maximum(tokens, 1.0)


def summary(sums: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Values of a record, from the sums of a window of steps; empty where nothing was routed.

  By layer [n]: `expert_load` [n, E], the shares of the slots; `load_max_over_mean`, 1 when
  balanced and at most E; `router_entropy` in nats, at most log E; `dead_experts`, how many had no
  slot in the window. The last three also by t, [n, T_BUCKETS] with `_by_t` in their names, NaN
  where no row was.
  """
  if LOAD not in sums or not np.any(counts[LOAD] > 0):
    return {}
  load, entropy, tokens = sums[LOAD], sums[ENTROPY], counts[ENTROPY]
  total = load.sum(1)
  return {
    "expert_load": total / total.sum(-1, keepdims=True),
    **_evenness(total, entropy.sum(1), tokens.sum(1)),
    **{f"{name}_by_t": x for name, x in _evenness(load, entropy, tokens).items()},
  }


def _evenness(load: np.ndarray, entropy: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
  """load [..., E], the others [...]."""
  seen = np.where(tokens > 0, tokens, np.nan)
  return {
    "load_max_over_mean": load.max(-1) * load.shape[-1] / seen,
    "router_entropy": entropy / seen,
    "dead_experts": np.where(tokens > 0, (load == 0).sum(-1), np.nan),
  }
