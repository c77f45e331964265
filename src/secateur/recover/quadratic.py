"""The layer problem that all weight updates share: keep `X W'` close to `X W` with `W'` zero outside a mask.

The loss of a layer is `tr((W - W') G (W - W')^T)` with `G = X^T X`, the second moment of its inputs over all
calibration tokens. Columns are normalised first, `G_ij / (n_i n_j)` and `W_ij n_j` with `n_j = sqrt(G_jj)`: then
the damping has no scale, and the magnitude of a normalised weight is its Wanda score.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.errors import NumericError

__all__ = ["LayerProblem", "loss", "one_thread", "pose", "refit"]

DAMPING = (0.01, 0.1, 1.0)  # multiples of the mean diagonal, tried in this order


@dataclass(frozen=True)
class LayerProblem:
    """A layer problem in normalised columns, damped until its matrix can be factorised.

    Attributes:
        moment: damped, normalised second moment, symmetric positive definite, diagonal `1 + damping`.
        target: normalised dense weights.
        norm: `n_j`; 1 for a dead column.
        dead: inputs that are zero for every token; their weights play no part.
        damping: the multiple of the mean diagonal that was added.
    """

    moment: Float[Tensor, "in in"]
    target: Float[Tensor, "out in"]
    norm: Float[Tensor, " in"]
    dead: Bool[Tensor, " in"]
    damping: float

    def weights(self, normalised: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Back from normalised columns; a dead column keeps nothing."""
        return (normalised / self.norm).masked_fill(self.dead, 0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Factorise on one thread, so that results are the same bytes whatever the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pose(weight: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]) -> LayerProblem:
    """Normalise and damp a layer problem.

    Damping starts at 0.01 of the mean diagonal and grows tenfold until a Cholesky factorisation succeeds; it is
    never replaced by the identity.

    Raises:
        NumericError: NaN or Inf in the moment, or no factorisation up to a damping of 1.

    Cost: O(in^3).
    """
    if not bool(second_moment.isfinite().all()):
        raise NumericError("NaN or Inf in the second moment of the inputs; look at the calibration data")
    diagonal = second_moment.diagonal()
    dead = diagonal <= 0
    norm = diagonal.sqrt().masked_fill(dead, 1)
    moment = second_moment / norm / norm[:, None]
    moment.diagonal().masked_fill_(dead, 1)
    for damping in DAMPING:
        damped = moment.clone()
        damped.diagonal().add_(damping)
        with one_thread():
            if int(torch.linalg.cholesky_ex(damped).info) == 0:
                return LayerProblem(damped, weight * norm, norm, dead, damping)
    raise NumericError(
        f"the second moment of {weight.shape[1]} inputs cannot be factorised with damping up to {DAMPING[-1]:g} of its "
        "mean diagonal; give more calibration data, or prune this layer without a weight update"
    )


def loss(
    weight: Float[Tensor, "out in"], dense: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]
) -> float:
    """`tr((W - W') G (W - W')^T)`: the summed squared error of the layer's outputs on the calibration tokens."""
    error = (weight - dense).double()
    return float(((error @ second_moment.double()) * error).sum())


def refit(problem: LayerProblem, mask: Bool[Tensor, "out in"], steps: int) -> Float[Tensor, "out in"]:
    """Conjugate gradients restricted to the mask: every row's least squares at once, in normalised columns.

    Few steps get most of the gain and regularise: the exact optimum of a layer overfits its calibration data.

    Args:
        problem: the layer problem.
        mask: kept weights.
        steps: conjugate-gradient steps, started at the masked dense weights.

    Returns:
        Normalised weights, exactly zero outside the mask; the (damped) loss never rises from step to step.

    Cost: `steps` products `(out, in) x (in, in)`.

    Source: Meng et al. 2024 (ALPS), algorithm 2, with a diagonal that is constant after normalisation, so no
        preconditioner is needed.
    """
    keep = mask.to(problem.target.dtype)
    solution = problem.target * keep
    residual = ((problem.target - solution) @ problem.moment) * keep
    direction = residual.clone()
    square = residual.square().sum(1)
    tiny = torch.finfo(square.dtype).tiny
    for _ in range(steps):
        image = (direction @ problem.moment) * keep
        # a row that is solved has no direction left; it stays where it is
        step = square / (direction * image).sum(1).clamp(min=tiny)
        solution += step[:, None] * direction
        residual -= step[:, None] * image
        new_square = residual.square().sum(1)
        direction = residual + (new_square / square.clamp(min=tiny))[:, None] * direction
        square = new_square
    return solution
