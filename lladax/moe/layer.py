"""The mixture-of-experts layer: router, experts' weights, exchange, shared expert."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas.fused_moe import QuantizedExperts
from lladax.moe.expert_parallel import Exchange, Experts, Fsdp, specs_of
from lladax.moe.router import Router, RouterStats, TopKSoftmax, router_stats
from lladax.sharding import axes_in, joined, on_devices, spec
from lladax.types import RowGroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """Experts of one layer.

  Attributes:
    num_experts: E.
    num_experts_per_tok: k.
    expert_intermediate_size: F, width of one expert.
    shared_expert_intermediate_size: width of an expert that every token passes; None: there is
      none (as in LLaDA-MoE-7B-A1B).
    router: logits -> weights and experts.
    exchange: how tokens and experts meet on a mesh.
    implementation: of the experts' computation. One of `kernels_pallas.expert_ffn`; None chooses by
      platform. "fused_moe": `kernels_pallas.fused_moe`, which has no derivative. "inference": that
      where it is faster (`kernels_pallas.fused_moe.is_faster`), else as None.

  Raises:
    ValueError: if k is not between 1 and E, or a width is not positive.
  """

  num_experts: int
  num_experts_per_tok: int
  expert_intermediate_size: int
  shared_expert_intermediate_size: int | None = None
  router: Router = TopKSoftmax()
  exchange: Exchange = Fsdp()
  implementation: str | None = None

  def __post_init__(self):
    if not 1 <= self.num_experts_per_tok <= self.num_experts:
      raise ValueError(
        f"num_experts_per_tok must lie between 1 and num_experts={self.num_experts}, "
        f"got {self.num_experts_per_tok}"
      )
    for field in ("expert_intermediate_size", "shared_expert_intermediate_size"):
      width = getattr(self, field)
      if width is not None and width < 1:
        raise ValueError(f"{field} must be positive, got {width}")


class MoELayer(nn.Module):
  """x [B, L, D] -> (y [B, L, D], RouterStats). Router in float32.

  Gate and up projections of an expert lie in one matrix [D, 2F], gate first. Router, dispatch and
  experts run in one `shard_map`; the statistics are of the whole batch, whatever the mesh.
  Experts' weights may be `QuantizedExperts` (`lladax.models.quantize_params`), for inference.
  `valid`: bool[B, L], False on padding; `groups`: of the rows, for the statistics.
  """

  config: MoEConfig
  initializer_range: float = 0.02
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, valid: jax.Array | None = None, groups: RowGroups | None = None
  ) -> tuple[jax.Array, RouterStats]:
    config, width = self.config, x.shape[-1]
    E, F = config.num_experts, config.expert_intermediate_size
    of_gate_up, of_down = config.exchange.axes
    router = self._param("router", (width, E), ("activation", "router"), jnp.float32)
    gate_up = self._param("gate_up", (E, width, 2 * F), of_gate_up)
    down = self._param("down", (E, F, width), of_down)
    bias = None
    if config.router.has_bias:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("router",))
      bias = self.param("expert_bias", zeros, (E,), jnp.float32)

    rows = spec(x.shape, "batch", "length", None)
    experts = Experts(
      num_experts=E,
      gate_up=spec(gate_up.shape, *of_gate_up),
      down=spec(down.shape, *of_down),
      rows=axes_in(*rows),
    )
    config.exchange.check(experts)
    whole = joined()

    def local(x, router, gate_up, down, bias, valid, groups):
      tokens = x.reshape(-1, width)  # [T, D]
      logits = jnp.dot(tokens.astype(jnp.float32), router)  # [T, E]
      routing = config.router(logits, config.num_experts_per_tok, bias)
      y, dropped = config.exchange(
        tokens,
        routing.weights,
        routing.experts,
        _in_dtype(gate_up, x.dtype),
        _in_dtype(down, x.dtype),
        experts,
        implementation=config.implementation,
      )
      valid = None if valid is None else valid.reshape(-1)
      of_tokens = None if groups is None else groups.of_tokens(x.shape[1])
      stats = router_stats(
        logits, routing, valid, groups=of_tokens, dropped=dropped, axes=experts.rows
      )
      return y.reshape(x.shape), stats

    return on_devices(
      local,
      (
        *(rows, whole, specs_of(gate_up, experts.gate_up), specs_of(down, experts.down)),
        *(whole, joined(*rows[:2]), joined(rows[0])),
      ),
      (rows, whole),
      *(x, router, gate_up, down, bias, valid, groups),
    )

  def _param(self, name, shape, axes, dtype=None):
    if self.has_variable("params", name):
      given = nn.meta.unbox(self.get_variable("params", name))
      if isinstance(given, QuantizedExperts):
        return _checked(name, given, shape)
    init = nn.initializers.normal(self.initializer_range)
    return self.param(
      name, nn.with_logical_partitioning(init, axes), shape, dtype or self.param_dtype
    )


def _in_dtype(weights, dtype):
  return weights if isinstance(weights, QuantizedExperts) else weights.astype(dtype)


def _checked(name: str, weights: QuantizedExperts, shape: tuple[int, ...]) -> QuantizedExperts:
  scales = (shape[0], shape[2])
  if weights.shape != shape or weights.scales.shape != scales:
    raise ValueError(
      f"quantized {name} has values {weights.shape} and scales {weights.scales.shape}; this config "
      f"has {shape} and {scales}"
    )
  return weights
