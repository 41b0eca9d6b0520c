"""Kernels of the mixture of experts: per op a reference (the meaning) and faster implementations.

Floor 0 of the project: imports JAX only, knows nothing of models.
"""
