"""Checkpoints larger than memory: pruned from file to file, a tensor or a decoder block at a time."""

from secateur.stream.job import Outcome, asked_before, prune_checkpoint

__all__ = ["Outcome", "asked_before", "prune_checkpoint"]
