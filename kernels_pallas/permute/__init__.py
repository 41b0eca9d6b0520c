"""Tokens to expert order and back."""

from kernels_pallas.permute.api import IMPLEMENTATIONS, combine, dispatch

__all__ = ["IMPLEMENTATIONS", "combine", "dispatch"]
