"""Grouped matmul: rows sorted by group, one matrix per group."""

from kernels_pallas.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul, grouped_swiglu

__all__ = ["IMPLEMENTATIONS", "grouped_matmul", "grouped_swiglu"]
