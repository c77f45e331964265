"""Scores made for whole units: neurons, channels, heads.

They are written for one matrix like all others. What they look at, and how the numbers of a unit become its score,
is said by `looking_at`; a plain score of weights takes the mean over all weights of a unit.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from secateur.core.site import looking_at

__all__ = ["active", "flap", "gate", "l2", "slimming", "taylor_whole"]


def _root(total: Tensor, count: int) -> Tensor:
    return (total / count).sqrt()


def _size(total: Tensor, count: int) -> Tensor:
    return total.abs()


@looking_at(finish=_root)
def l2(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The root mean square of a unit's weights over all of its slices; the squares of single weights.

    Source: Li, Kadav, Durdanovic, Samet, Graf 2017, "Pruning Filters for Efficient ConvNets", for filters, with the
        l2 norm; the mean instead of the sum makes axes comparable. `magnitude` is the same with absolute values.

    Example:
        >>> import torch
        >>> l2(torch.tensor([[-2.0, 1.0]]))
        tensor([[4., 1.]])
    """
    return weight.square()


@looking_at(finish=_size)
def taylor_whole(weight: Float[Tensor, "out in"], grad: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """First-order change of the loss when a whole unit becomes zero: `|sum w g|` over all of its weights.

    `taylor` takes the mean of `|w g|` instead, which cannot cancel; see docs/results.md before choosing this one.

    Source: Ma, Fang, Wang 2023, "LLM-Pruner", vector-wise importance.

    Example:
        >>> import torch
        >>> taylor_whole(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, 3.0]]))
        tensor([[-1.,  3.]])
    """
    return weight * grad


@looking_at("inputs", finish=_size)
def gate(weight: Float[Tensor, "out in"], input_gate: Float[Tensor, "row in"]) -> Float[Tensor, "row in"]:
    """How much the loss of a row of data changes with a gate on the unit: mean over rows of `|dL / d gate|`.

    A gate is a factor of 1 on what the unit gives to the layers that read it; for a head it is the sum of the gates
    of its columns, taken before the absolute value.

    Args:
        input_gate: for every calibration row the derivative of its loss by a gate on each input column.

    Source: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", equation 2; Molchanov et al. 2019,
        "Importance Estimation for Neural Network Pruning", gates after batch norms.

    Example:
        >>> import torch
        >>> gate(torch.ones(1, 2), torch.tensor([[0.5, -3.0], [0.5, 1.0]])).shape
        torch.Size([2, 2])
    """
    return input_gate


@looking_at("inputs")
def active(weight: Float[Tensor, "out in"], input_zeros: Float[Tensor, " in"]) -> Float[Tensor, "1 in"]:
    """The fraction of tokens or positions at which a unit is not exactly zero: 1 - APoZ, for ReLU networks.

    Args:
        input_zeros: fraction of exact zeros of every input column.

    Source: Hu, Peng, Tai, Tang 2016, "Network Trimming", equation 1 (average percentage of zeros).

    Example:
        >>> import torch
        >>> active(torch.ones(3, 2), torch.tensor([0.25, 1.0]))
        tensor([[0.7500, 0.0000]])
    """
    return 1 - input_zeros[None]


@looking_at("inputs")
def flap(weight: Float[Tensor, "out in"], input_variance: Float[Tensor, " in"]) -> Float[Tensor, "1 in"]:
    """How much a unit moves the next layer's output around its mean: `var(x_j) * ||W_j||^2`.

    A unit that hardly fluctuates can be replaced by its mean, which a bias can hold; so pruning by this score
    wants the means folded into the next bias.

    Args:
        input_variance: of every input column over all real calibration tokens.

    Source: An, Zhao, Yu, Tang, Wang 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        equation 5. Deviation: the variance is that of all tokens together, not a running mean of batches.

    Example:
        >>> import torch
        >>> flap(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.tensor([2.0, 7.0]))
        tensor([[50.,  7.]])
    """
    return (input_variance * weight.square().sum(0))[None]


@looking_at("scales")
def slimming(weight: Float[Tensor, "1 channel"]) -> Float[Tensor, "1 channel"]:
    """The absolute scale of the batch norm behind a channel, `|gamma|`; best after training with an l1 penalty on it.

    Source: Liu, Li, Shen, Huang, Yan, Zhang 2017, "Learning Efficient Convolutional Networks through Network
        Slimming".

    Example:
        >>> import torch
        >>> slimming(torch.tensor([[-2.0, 1.0]]))
        tensor([[2., 1.]])
    """
    return weight.abs()
