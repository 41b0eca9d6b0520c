"""Root-mean-square normalisation."""

from kernels_pallas.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
