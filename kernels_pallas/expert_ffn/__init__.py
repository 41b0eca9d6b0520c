"""The feed-forward layer of routed experts."""

from kernels_pallas.expert_ffn.api import IMPLEMENTATIONS, combine, dispatch, expert_ffn

__all__ = ["IMPLEMENTATIONS", "combine", "dispatch", "expert_ffn"]
