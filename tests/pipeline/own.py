"""A small classifier and its data, as a user would bring them."""

import torch
from torch import nn


def build():
    """Two layers that start at random."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3)), torch.zeros(1, 8)


def _batches(seed, count):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(8, 3, generator=torch.Generator().manual_seed(7))
    inputs = [torch.randn(16, 8, generator=generator) for _ in range(count)]
    return [(x, (x @ truth).argmax(1)) for x in inputs]


def train():
    """Twenty batches to learn from."""
    return _batches(0, 20)


def test():
    """Eight batches to be judged by."""
    return _batches(1, 8)


test.__test__ = False
