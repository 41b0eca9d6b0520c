"""The experts that a pass of decoding needs, and the least bytes that it moves.

Which experts is data. Taken is that each token chooses any k of E as likely as any others, so that
of T tokens some one chooses an expert with probability 1 - (1 - k / E)^T.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from kernels_pallas.fused_moe.pallas_tpu import ROWS
from lladax.moe import MoEConfig
from lladax.scaling.cost import Live, Share
from lladax.scaling.hlo import HBM, Shape
from lladax.scaling.memory import shard_bytes
from lladax.sharding import axes_in, partition

EXPERTS = ("gate_up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
  """The experts of a device in a pass.

  Attributes:
    total: E.
    here: experts on the device.
    k: of a token.
    tokens: that choose among them: those of all devices that share the experts.
  """

  total: int
  here: int
  k: int
  tokens: float

  @classmethod
  def of(cls, moe: MoEConfig, mesh: jax.sharding.Mesh, params, *, rows: int, tokens: int) -> Routed:
    """Of a pass over `tokens` of `rows` rows in all.

    Args:
      moe: of the model.
      mesh: that `params` lie on.
      params: abstract parameters with shardings.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    experts = next(leaf for path, leaf in leaves if is_expert(path))
    over = axes_in(experts.sharding.spec[0])
    apart = axes_in(*partition(mesh, (rows,), ("batch",))) - over
    return cls(
      total=moe.num_experts,
      here=experts.sharding.shard_shape(experts.shape)[0],
      k=moe.num_experts_per_tok,
      tokens=tokens / math.prod(mesh.shape[axis] for axis in apart),
    )

  @property
  def active(self) -> float:
    """The share of the experts that some token chooses."""
    return 1 - (1 - self.k / self.total) ** self.tokens

  def live(self) -> Live:
    """Of what the experts' kernels state, the share that is expected."""
    slots = self.k * self.tokens
    here = self.here / self.total  # of all slots those of experts that are here

    def fused(shapes: list[Shape]) -> Share:
      """It states as many experts as there may be, or where it gathers their rows all slots."""
      read = self.here * self.active / min(self.here, slots)
      return Share(flops=read if self.tokens <= ROWS else here, hbm=read)

    def grouped(shapes: list[Shape]) -> Share:
      """It states all rows of `lladax.moe.dispatch.make_plan`; weights are read whole."""
      filled = here * self.k / min(self.k, self.here)
      shapes = [shape for shape in shapes if shape.space == HBM]
      weights = max((s.bytes for s in shapes if s.dims[:1] == (self.here,)), default=0)
      rows = sum(s.bytes for s in shapes if s.dims[:1] != (self.here,))
      moved = weights + rows
      return Share(flops=filled, hbm=(weights + filled * rows) / moved if moved else filled)

    return {"fused_moe": fused, "/moe/": grouped}


def is_expert(path) -> bool:
  """Whether this is the path of experts' weights, or of their values or scales in eight bits."""
  return any(f"'{name}'" in jax.tree_util.keystr(path) for name in EXPERTS)


def needed_bytes(params, memory: float, routed: Routed | None, *, tied: bool) -> float:
  """The bytes that a device cannot but move between HBM and chip in a pass.

  Each weight that lies on it once, of the experts those that some token chooses; keys and values
  once, which prefill writes and a block's step reads. Rows of the embeddings are left out, as is
  all that could stay on the chip.

  Args:
    params: abstract parameters with shardings.
    memory: bytes of keys and values on the device.
    routed: None without experts.
    tied: whether the head is the table of embeddings, which then is read whole.
  """
  total = memory
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if is_expert(path):
      total += shard_bytes(leaf) * routed.active
    elif tied or "'embed'" not in jax.tree_util.keystr(path):
      total += shard_bytes(leaf)
  return total
