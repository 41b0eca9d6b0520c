"""Experiments: each file declares a config, how it is trained and how it is evaluated."""
