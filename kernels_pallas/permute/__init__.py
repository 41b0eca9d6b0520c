"""Tokens to expert order and back."""
