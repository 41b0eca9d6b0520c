"""Costs of models and of compiled programs on slices of TPUs."""

from lladax.scaling.flops import TokenFlops, token_flops, train_flops

__all__ = ["TokenFlops", "token_flops", "train_flops"]
