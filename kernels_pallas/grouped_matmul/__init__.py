"""Grouped matmul: rows sorted by group, one matrix per group."""

from kernels_pallas.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]
