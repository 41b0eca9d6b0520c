"""The feed-forward layer of routed experts."""

from kernels_pallas.expert_ffn.api import IMPLEMENTATIONS, expert_ffn
from kernels_pallas.permute import combine, dispatch

__all__ = ["IMPLEMENTATIONS", "combine", "dispatch", "expert_ffn"]
