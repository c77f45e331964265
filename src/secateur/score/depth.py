"""What a block is worth, by what it does to the stream that runs through it. Higher = keep."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["angular_distance", "block_influence"]


def block_influence(cosine: Float[Tensor, " start"]) -> Float[Tensor, " start"]:
    """`1 - mean cos(x, f(x))` over real tokens: a block that hardly turns the stream is worth little.

    Args:
        cosine: for each run of blocks the mean cosine similarity of what enters and what leaves.

    Source: Men et al. 2024 (ShortGPT), equation 1, for single blocks.

    Example:
        >>> import torch
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
