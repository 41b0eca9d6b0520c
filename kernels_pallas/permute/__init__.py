"""Tokens to expert order and back."""

from kernels_pallas.permute.api import IMPLEMENTATIONS, collect, combine, dispatch

__all__ = ["IMPLEMENTATIONS", "collect", "combine", "dispatch"]
