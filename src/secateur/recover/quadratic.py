"""The layer problem that all weight updates share: keep `X W'` close to `X W` with `W'` zero outside a mask.

The loss of a layer is `tr((W - W') G (W - W')^T)` with `G = X^T X`, the second moment of its inputs over all
calibration tokens. Columns are normalised first, `G_ij / (n_i n_j)` and `W_ij n_j` with `n_j = sqrt(G_jj)`: then
the damping has no scale, and the magnitude of a normalised weight is its Wanda score.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.errors import NumericError

__all__ = ["Factored", "LayerProblem", "loss", "one_thread", "pose", "refit"]

DAMPING = (0.01, 0.1, 1.0)  # multiples of the mean diagonal, tried in this order


@dataclass(frozen=True)
class Factored:
    """A second moment in normalised columns, damped until it can be factorised; shared by layers with one input.

    Attributes:
        moment: damped, normalised second moment, symmetric positive definite, diagonal `1 + damping`.
        factor: upper triangular `R` with `moment = R R^T`.
        norm: `n_j`; 1 for a dead column.
        dead: inputs that are zero for every token. Nothing is known about their weights: those are worth nothing
            to a score, and those that are kept all the same stay as they are.
        damping: the multiple of the mean diagonal that was added.
    """

    moment: Float[Tensor, "in in"]
    factor: Float[Tensor, "in in"]
    norm: Float[Tensor, " in"]
    dead: Bool[Tensor, " in"]
    damping: float

    @cached_property
    def spectrum(self) -> tuple[Float[Tensor, " in"], Float[Tensor, "in in"]]:
        """Eigenvalues and eigenvectors of the moment, found in float64."""
        with one_thread():
            values, vectors = torch.linalg.eigh(self.moment.double())
        return values.to(self.moment.dtype), vectors.to(self.moment.dtype)

    def inverse(self, rho: float) -> Float[Tensor, "in in"]:
        """`(moment + rho I)^-1`, kept for the next layer that asks for it."""
        if rho not in self._inverses:
            shifted = self.moment.clone()
            shifted.diagonal().add_(rho)
            with one_thread():
                self._inverses[rho] = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        return self._inverses[rho]

    @cached_property
    def _inverses(self) -> dict[float, Tensor]:
        return {}


@dataclass(frozen=True)
class LayerProblem:
    """A layer problem in normalised columns.

    Attributes:
        known: what is known of the inputs.
        target: normalised dense weights.
    """

    known: Factored
    target: Float[Tensor, "out in"]

    @property
    def moment(self) -> Float[Tensor, "in in"]:
        """See `Factored`."""
        return self.known.moment

    @property
    def factor(self) -> Float[Tensor, "in in"]:
        """See `Factored`."""
        return self.known.factor

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """See `Factored`."""
        return self.known.norm

    @property
    def dead(self) -> Bool[Tensor, " in"]:
        """See `Factored`."""
        return self.known.dead

    @property
    def damping(self) -> float:
        """See `Factored`."""
        return self.known.damping

    def worth(self, normalised: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The magnitude of normalised weights, zero in dead columns: what supports are searched by."""
        return normalised.abs().masked_fill_(self.dead, 0)

    def weights(self, normalised: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Back from normalised columns."""
        return normalised / self.known.norm


@contextmanager
def one_thread() -> Iterator[None]:
    """Factorise on one thread, so that results are the same bytes whatever the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# tensor that holds moments -> (where in it, how often it was changed, normalised or not) -> what was found; gone with
# the tensor itself
_FACTORED: MutableMapping[Tensor, dict[tuple[Any, ...], Factored]] = WeakTensorKeyDictionary()


def pose(
    weight: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"], *, normalise: bool = True
) -> LayerProblem:
    """Normalise and damp a layer problem.

    Damping starts at 0.01 of the mean diagonal and grows tenfold until a Cholesky factorisation succeeds; it is
    never replaced by the identity. Layers that pass the very same moment (q, k and v) share one factorisation.

    Args:
        weight: dense weights.
        second_moment: `X^T X`.
        normalise: False leaves the columns as they are (the mean diagonal is then the raw one).

    Raises:
        NumericError: NaN or Inf in the moment, or no factorisation up to a damping of 1.

    Cost: one factorisation, O(in^3); three `(in, in)` matrices of memory for as long as the moment lives.
    """
    holder = second_moment if second_moment._base is None else second_moment._base
    found = _FACTORED.setdefault(holder, {})
    place = second_moment.storage_offset(), second_moment.stride(), second_moment.shape
    key = (*place, second_moment._version, normalise)
    if key not in found:
        found[key] = _factored(second_moment, normalise)
    known = found[key]
    return LayerProblem(known, weight * known.norm)


def _factored(second_moment: Float[Tensor, "in in"], normalise: bool) -> Factored:
    if not all(bool(end.isfinite()) for end in second_moment.aminmax()):
        raise NumericError("NaN or Inf in the second moment of its inputs; look at the calibration data")
    diagonal = second_moment.diagonal()
    dead = diagonal <= 0
    norm = diagonal.sqrt().masked_fill(dead, 1) if normalise else torch.ones_like(diagonal)
    moment = second_moment / norm
    moment.div_(norm[:, None])
    own = moment.diagonal().masked_fill(dead, 1)
    scale = float(own.mean())
    for damping in DAMPING:
        moment.diagonal().copy_(own + damping * scale)
        factor = _factorise(moment)
        if factor is not None:
            return Factored(moment, factor, norm, dead, damping)
    raise NumericError(
        f"the second moment of {len(norm)} inputs cannot be factorised with damping up to {DAMPING[-1]:g} of its "
        "mean diagonal; give more calibration data, or prune this layer without a weight update"
    )


def _factorise(moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"] | None:
    """Upper triangular `R` with `moment = R R^T`: a Cholesky factorisation from the last column to the first."""
    with one_thread():
        lower, failed = torch.linalg.cholesky_ex(moment.flip(0, 1))
    return None if int(failed) else lower.flip(0, 1)


def loss(
    weight: Float[Tensor, "out in"], dense: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]
) -> float:
    """`tr((W - W') G (W - W')^T)`: the summed squared error of the layer's outputs on the calibration tokens.

    Example:
        >>> inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), inputs.t() @ inputs)
        20.0
    """
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
        Normalised weights, exactly zero outside the mask. The damped loss never rises from step to step, and the
        loss without damping never exceeds that of the masked dense weights: of all weights on the mask those
        are nearest to the dense ones, so damping favours them.

    Cost: `steps + 1` products `(out, in) x (in, in)`.

    Source: Meng et al. 2024 (ALPS), algorithm 2, with a diagonal that is constant after normalisation, so no
        preconditioner is needed.
    """
    keep = mask.to(problem.target.dtype)
    solution = problem.target * keep
    residual = ((problem.target - solution) @ problem.moment).mul_(keep)
    direction = residual.clone()
    square = residual.square().sum(1)
    tiny = torch.finfo(square.dtype).tiny
    for _ in range(steps):
        image = (direction @ problem.moment).mul_(keep)
        # a row that is solved has no direction left; it stays where it is
        step = square / (direction * image).sum(1).clamp_(min=tiny)
        solution.addcmul_(direction, step[:, None])
        residual.addcmul_(image, step[:, None], value=-1)
        new_square = residual.square().sum(1)
        direction = direction.mul_((new_square / square.clamp(min=tiny))[:, None]).add_(residual)
        square = new_square
    return solution
