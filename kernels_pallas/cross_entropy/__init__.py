"""Cross-entropy of an output head, weighted per token."""

from kernels_pallas.cross_entropy.api import IMPLEMENTATIONS, weighted_nll

__all__ = ["IMPLEMENTATIONS", "weighted_nll"]
