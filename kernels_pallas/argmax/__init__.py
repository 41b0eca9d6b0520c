"""The likeliest token."""

from kernels_pallas.argmax.api import argmax

__all__ = ["argmax"]
