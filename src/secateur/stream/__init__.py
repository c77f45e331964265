"""Checkpoints larger than memory: pruned from file to file, a tensor or a decoder block at a time."""

from secateur.stream.choosing import choose_units
from secateur.stream.job import Outcome, prune_checkpoint
from secateur.stream.journal import asked_before
from secateur.stream.shrinking import shrink_checkpoint

__all__ = ["Outcome", "asked_before", "choose_units", "prune_checkpoint", "shrink_checkpoint"]
