"""Scores that need no data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["magnitude", "random"]


def magnitude(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The absolute weight, `|w|`.

    Source: Han, Pool, Tran, Dally 2015, "Learning both Weights and Connections", section 3.

    Example:
        >>> magnitude(torch.tensor([[-2.0, 1.0]]))
        tensor([[2., 1.]])
    """
    return weight.abs()


def random(weight: Float[Tensor, "out in"], generator: torch.Generator) -> Float[Tensor, "out in"]:
    """A uniform random number for every weight: the control that any other score has to beat.

    Args:
        generator: seeded from the run's seed and the layer's name, so layers are independent of each
            other and of the order in which they are visited.
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)
