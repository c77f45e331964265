"""What a block is worth, by what it does to the stream that runs through it. Higher = keep."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["angular_distance", "block_influence", "last_blocks", "loss_without", "random_blocks"]


def block_influence(cosine: Float[Tensor, " start"]) -> Float[Tensor, " start"]:
    """`1 - mean cos(x, f(x))` over real tokens: a block that hardly turns the stream is worth little.

    Args:
        cosine: for each run of blocks the mean cosine similarity of what enters and what leaves.

    Source: Men et al. 2024 (ShortGPT), equation 1, for single blocks.

    Example:
        >>> block_influence(torch.tensor([1.0, 0.75]))
        tensor([0.0000, 0.2500])
    """
    return 1 - cosine


def angular_distance(angle: Float[Tensor, " start"]) -> Float[Tensor, " start"]:
    """`mean arccos(cos(x, f(x))) / pi` over real tokens, in [0, 1], meant for a run of consecutive blocks.

    Args:
        angle: for each run of blocks the mean angle between what enters and what leaves, over pi.

    Source: Gromov et al. 2024 (The unreasonable ineffectiveness of the deeper layers), equation 7, who look at the
        last token of each text only; here all real tokens count.
    """
    return angle


def loss_without(loss_without: Float[Tensor, " start"]) -> Float[Tensor, " start"]:
    """The loss on data of the model without a run of blocks: the most direct score, and the dearest.

    Args:
        loss_without: for each run of blocks the mean loss of the model that lacks it.

    Source: Zhong et al. 2024 (BlockPruner) and Kim et al. 2024 (Shortened LLaMA) by perplexity.
    """
    return loss_without


def last_blocks(position: Float[Tensor, " start"]) -> Float[Tensor, " start"]:
    """Later blocks are worth less: a control without data."""
    return -position


def random_blocks(position: Float[Tensor, " start"], generator: torch.Generator) -> Float[Tensor, " start"]:
    """Uniform random numbers: the control that any other score has to beat."""
    return torch.rand(position.shape, generator=generator, dtype=torch.float64)
