"""Prune a neural network and keep the gain."""

__version__ = "0.1.0"
