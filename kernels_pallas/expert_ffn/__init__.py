"""The feed-forward layer of routed experts."""

from kernels_pallas.expert_ffn.api import IMPLEMENTATIONS, expert_ffn

__all__ = ["IMPLEMENTATIONS", "expert_ffn"]
