"""The experts' feed-forward layer for decoding: few tokens, each active expert read once."""

from kernels_pallas.fused_moe.api import IMPLEMENTATIONS, fused_moe, is_faster
from kernels_pallas.fused_moe.quantize import QuantizedExperts, quantize

__all__ = ["IMPLEMENTATIONS", "QuantizedExperts", "fused_moe", "is_faster", "quantize"]
