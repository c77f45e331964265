"""Scores that weigh a weight by what the loss would lose with it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["fisher", "movement", "taylor"]


def taylor(weight: Float[Tensor, "out in"], grad: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """First-order change of the loss when the weight becomes zero: `|w g|`.

    Args:
        grad: gradient of the mean loss over the calibration data.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019, "Importance Estimation for Neural Network Pruning",
        equation 8 without the square, which does not change the order; Ma, Fang, Wang 2023, "LLM-Pruner",
        element-wise importance of first order.

    Example:
        >>> import torch
        >>> taylor(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, 3.0]]))
        tensor([[1., 3.]])
    """
    return (weight * grad).abs()


def fisher(weight: Float[Tensor, "out in"], grad_squared: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Second-order change of the loss by the empirical Fisher information: `w^2 E[g^2] / 2`.

    Where `taylor` averages gradients that may cancel at a minimum, this averages their squares, a row of
    calibration data at a time.

    Args:
        grad_squared: mean over calibration rows of the squared gradient of the row's loss.

    Source: Theis, Korshunova, Tejani, Huszar 2018, "Faster gaze prediction with dense networks and Fisher
        pruning", equation 8, for single weights.

    Example:
        >>> import torch
        >>> fisher(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, 4.0]]))
        tensor([[1., 2.]])
    """
    return 0.5 * weight.square() * grad_squared


def movement(weight: Float[Tensor, "out in"], movement: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """How far training has moved a weight away from zero: `- sum_t w_t g_t`.

    Large weights that fine-tuning shrinks go before small ones that it grows, so this suits a pretrained model that
    is tuned for a task. It needs the history of training; see `Gradual`.

    Args:
        movement: the sum, over the steps of training so far.

    Source: Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", equation 3 with a learning
        rate of scores of 1. Deviation: what is pruned stays pruned; the authors let masked weights come back.

    Example:
        >>> import torch
        >>> movement(torch.tensor([[-2.0, 1.0]]), torch.tensor([[-0.5, 3.0]]))
        tensor([[-0.5000,  3.0000]])
    """
    return movement
