"""Linear maps."""

from kernels_pallas.linear.api import linear

__all__ = ["linear"]
