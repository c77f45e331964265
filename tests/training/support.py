"""A small network that trains, and looks at bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Masks


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 1, 4, 4, generator=generator)
    return F.cross_entropy(model(images), torch.randint(0, 3, (8,), generator=generator))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner, steps: int, start: int = 0) -> None:
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


def check_zeros(model: nn.Module, masks: Masks) -> None:
    """Every pruned weight has the bits of positive zero, every other weight is not zero."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert not parameters[name].detach().view(torch.int32)[~mask].any(), name
        assert parameters[name][mask].ne(0).all(), name
