"""Scores that weigh a weight by the activations it meets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.site import looking_at

__all__ = ["RIA", "activation", "wanda", "wanda_l1"]


def wanda(weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """The weight's magnitude times the l2 norm of its input: `|W_ij| * ||X_j||_2`.

    A small weight on a loud input can matter more than a large one on a silent input. The authors compare
    weights within each output row (`per_row`).

    Args:
        input_norm: l2 norm of every input column over all real calibration tokens.

    Source: Sun, Liu, Bair, Kolter 2024, "A Simple and Effective Pruning Approach for Large Language Models",
        equation 1. Deviations: the norm runs over real tokens (the authors' code averages per sequence
        and counts padding); counts are exact (their code rounds down in every row).

    Example:
        >>> wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([0.5, 3.0]))
        tensor([[1., 3.]])
    """
    return weight.abs() * input_norm


def wanda_l1(weight: Float[Tensor, "out in"], input_norm_l1: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Wanda with the l1 norm of the input: `|W_ij| * ||X_j||_1`, the variant of the paper's ablation."""
    return weight.abs() * input_norm_l1


@dataclass(frozen=True)
class RIA:
    """Relative importance and activations: a weight's share of its row and of its column, times its input.

    `(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2 ** power`. The shares keep every input and
    output channel alive, where plain magnitude can empty one.

    Args:
        power: exponent of the input norm; 0 leaves the data out of account.

    Source: Zhang, Bai, Yu, Cao, Wang, Xu 2024, "Plug-and-Play: An Efficient Post-training Pruning Method
        for Large Language Models", equations 2 and 3, power 0.5.

    Example:
        >>> RIA()(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.tensor([1.0, 1.0]))
        tensor([[0.7500, 1.5000],
                [1.0000, 0.7500]])
    """

    power: float = 0.5

    def __call__(
        self, weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]
    ) -> Float[Tensor, "out in"]:
        """Score one matrix."""
        size = weight.abs()
        # an all-zero row or column has no shares: its weights are worth nothing, not NaN
        tiny = torch.finfo(size.dtype).tiny
        shares = size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(
            min=tiny
        )
        return shares * input_norm**self.power


@looking_at("inputs")
def activation(
    weight: Float[Tensor, "out in"], input_activation: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """The mean activation `mean |x_j|` of the neuron that feeds a weight, the same for its whole column.

    With `Threshold(lambda)` it cuts everything that reads a neuron whose average activation is at most
    lambda; with `Columns()` neurons compete as wholes, and with `Neurons()` they go with all their weights.

    Args:
        input_activation: mean absolute value of every input column over all real calibration tokens.

    Example:
        >>> activation(torch.tensor([[-2.0, 1.0]]), torch.tensor([0.5, 3.0]))
        tensor([[0.5000, 3.0000]])
    """
    return input_activation.expand_as(weight)
