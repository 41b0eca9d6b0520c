"""Bidirectional attention within segments and blocks."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
