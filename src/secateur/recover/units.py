"""What removed units did is taken over by those that stay: constants into biases, the rest by least squares.

A removed unit feeds columns of the next layer, `y = W_K x_K + W_R x_R + b`. Of `x_R` its mean is a constant, which
belongs into the bias; and as far as `x_R` follows from `x_K` on calibration data, the columns that stay can say it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.visit import visit
from secateur.core.where import Layer, layers
from secateur.errors import NumericError, UsageError, nearest
from secateur.recover.constants import centred
from secateur.recover.quadratic import one_thread

__all__ = ["MendedUnits", "TakeOver", "Taken", "mend_units_", "take_over"]

How = Literal["least-squares", "bias"]
NEEDED = ("second_moment", "input_mean", "tokens")


@dataclass(frozen=True)
class TakeOver:
    """The update of a recipe on whole units: when all are chosen, what reads them is mended, see `mend_units_`.

    Args:
        how: "bias" folds the means of removed inputs into biases, "least-squares" refits the columns that stay as well.
        damping: of the second moment, for least squares.

    Example:
        >>> TakeOver("bias")
        TakeOver(how='bias', damping=0.01)
    """

    how: How = "least-squares"
    damping: float = 0.01

    def __post_init__(self):
        if self.how not in get_args(How):
            raise UsageError(f"TakeOver({self.how!r}): {nearest(self.how, get_args(How))}")
        if not self.damping >= 0:
            raise UsageError(f"TakeOver: damping is {self.damping}; expected at least 0")

    def idle(self, model: nn.Module, masks: Masks) -> tuple[tuple[str, ...], int]:
        """Layers that units went from and that stay as they are, for they have no bias to take means; of how many."""
        found = [layer for layer in layers(model) if _gone(layer, masks) is not None]
        without = tuple(layer.name for layer in found if _bias(layer) is None)
        return (without if self.how == "bias" else ()), len(found)

    def units_(self, model: nn.Module, masks: Masks, data: Iterable[Any]) -> MendedUnits:
        """Apply the masks of whole units and mend; see `mend_units_`."""
        return mend_units_(model, masks, data, how=self.how, damping=self.damping)


@dataclass(frozen=True)
class Taken:
    """How one layer was mended.

    Attributes:
        name: its weight.
        columns: removed inputs.
        bias: whether it has a bias that could take the means.
        before, after: mean squared error of its outputs on the calibration data against those with all inputs,
            relative to their mean square: masked alone, and mended.
    """

    name: str
    columns: int
    bias: bool
    before: float
    after: float


@dataclass(frozen=True)
class MendedUnits:
    """What `mend_units_` did, layer by layer in the order of the model."""

    layers: tuple[Taken, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{each.name}: {each.columns} inputs gone, relative squared error {each.before:.2e} -> {each.after:.2e}"
            + ("" if each.bias else " (no bias to take their means)")
            for each in self.layers
        )


def mend_units_(
    model: nn.Module,
    masks: Masks,
    data: Iterable[Any],
    *,
    how: How = "least-squares",
    damping: float = 0.01,
) -> MendedUnits:
    """Remove units of a dense model so that what reads them changes least: masks applied, readers mended.

    Each reader is mended right before it computes, on inputs that come from readers mended already, while the units
    that go still compute theirs. `shrink` then makes the model small.

    Args:
        model: still dense, for units that are zero already say nothing; changed in place.
        masks: of whole units, as `prune_` and `Analysis.masks` give them.
        data: calibration batches.
        how: "least-squares" refits the columns that stay, with the bias where there is one; "bias" folds the means
            of removed inputs into the bias and leaves weights alone (FLAP).
        damping: of the normalised second moment of the inputs that stay.

    Returns:
        The error of every mended layer before and after.

    Raises:
        UsageError: masks that remove no input of any layer, no data, or a layer that the data never reach. The model
            is then as it was.
        NumericError: NaN or Inf in a layer's input.

    Cost: one forward pass of all data as one batch, a second moment and a factorisation a layer, O(inputs^3).

    Source: bias: An et al. 2024 (FLAP), section 3.3. Least squares: the layer problem of SparseGPT and others with
        whole columns as support, so that all rows share one factorisation; with a bias the inputs are centred.
    """
    readers = {}
    for layer in layers(model):
        gone = _gone(layer, masks)
        if gone is not None:
            readers[layer.name] = (layer, gone)
    if not readers:
        raise UsageError(
            "these masks remove no input of any layer, so there is nothing to mend; give unit masks"
        )
    before = {name: parameter.detach().clone() for name, parameter in _changed(readers).items()}
    found: list[Taken] = []

    def at(layer: Layer, known: Mapping[str, Tensor]) -> None:
        found.append(_mend(layer, readers[layer.name][1], known, how, damping))

    try:
        visit(model, [layer for layer, _ in readers.values()], NEEDED, data, at)
        masks.apply_(model)
    except BaseException:
        with torch.no_grad():
            for name, parameter in _changed(readers).items():
                parameter.copy_(before[name])
        raise
    return MendedUnits(tuple(found))


def _gone(layer: Layer, masks: Masks) -> Bool[Tensor, "part in"] | None:
    """The columns of which every surviving row is masked; None where there are none."""
    names = [name for name in (layer.name, *layer.tied) if name in masks]
    if not names or layer.layout.rows is None:
        return None
    kept = layer.layout.to_matrices(masks[names[0]])
    alive = kept.any(1)
    gone = ~alive & kept.any(2).any(1, keepdim=True)  # a part that goes as a whole reads nothing any more
    return gone if bool(gone.any()) else None


def _changed(readers: Mapping[str, tuple[Layer, Tensor]]) -> dict[str, nn.Parameter]:
    found = {}
    for name, (layer, _) in readers.items():
        found[name] = layer.weight
        bias = _bias(layer)
        if bias is not None:
            found[f"{layer.path}.{layer.layout.bias}"] = bias
    return found


def _bias(layer: Layer) -> nn.Parameter | None:
    """The bias that belongs to a layer's weight."""
    return None if layer.layout.bias is None else getattr(layer.module, layer.layout.bias)


@torch.no_grad()
def _mend(layer: Layer, gone: Tensor, known: Mapping[str, Tensor], how: How, damping: float) -> Taken:
    weight = layer.layout.to_matrices(layer.weight.detach())
    bias = _bias(layer)
    shift = torch.zeros(weight.shape[:2], dtype=torch.float64)
    new = weight.clone()
    errors = torch.zeros(3, dtype=torch.float64)
    for part, columns in enumerate(gone):
        if not bool(columns.any()):
            continue
        moment, mean, tokens = (known[name][part].double() for name in NEEDED)
        try:
            own = take_over(
                weight[part].double(), columns, moment, mean, tokens, bias is not None, how, damping
            )
        except NumericError as error:
            raise NumericError(f"{layer.name}: {error}") from None
        new[part], shift[part] = own.weight.to(new.dtype), own.shift
        errors += torch.tensor([own.before, own.after, own.whole])
    layer.weight.copy_(layer.layout.from_matrices(new))
    if bias is not None:
        bias.add_(shift.reshape(-1).to(bias.device, bias.dtype))
    before, after, whole = errors.tolist()
    scale = whole if whole > 0 else 1.0
    return Taken(layer.name, int(gone.sum()), bias is not None, before / scale, after / scale)


@dataclass(frozen=True)
class _Own:
    """One matrix after its inputs went; errors are mean squares, summed over rows."""

    weight: Float[Tensor, "out in"]
    shift: Float[Tensor, " out"]
    before: float
    after: float
    whole: float


def take_over(
    weight: Float[Tensor, "out in"],
    gone: Bool[Tensor, " in"],
    second_moment: Float[Tensor, "in in"],
    mean: Float[Tensor, " in"],
    tokens: Float[Tensor, ""],
    has_bias: bool,
    how: How = "least-squares",
    damping: float = 0.01,
) -> _Own:
    """Columns `K` that stay take over what columns `R` that go did.

    With a bias the inputs are centred, `S = G / n - m m^T`, and `W_K + W_R X^T`, `b + W_R (m_R - X^T m_K)` with
    `X = S_KK^-1 S_KR` is the least-squares solution; without one, the same with `S = G / n` and no shift. The damped
    solution is never worse on the calibration data than leaving `W_K` alone.

    Raises:
        NumericError: NaN or Inf in the second moment, or no factorisation with ten thousand times the damping.
    """
    moment = second_moment / tokens.clamp(min=1)
    kept = ~gone
    spread = centred(second_moment, mean, tokens) / tokens.clamp(min=1) if has_bias else moment
    shares = torch.zeros(int(kept.sum()), int(gone.sum()), dtype=weight.dtype)
    if how == "least-squares":
        shares = _regression(spread[kept][:, kept], spread[kept][:, gone], damping)
    elif how != "bias":
        raise UsageError(f"how={how!r} is not known; expected 'least-squares' or 'bias'")
    new = torch.zeros_like(weight)
    new[:, kept] = weight[:, kept] + weight[:, gone] @ shares.t()
    shift = (
        weight[:, gone] @ (mean[gone] - shares.t() @ mean[kept]) if has_bias else torch.zeros_like(weight[:, 0])
    )
    before = _error(weight * gone, 0 * shift, moment, mean)
    after = _error(weight - new, shift, moment, mean)
    return _Own(new, shift, before, after, _error(weight, 0 * shift, moment, mean))


def _error(lost: Tensor, shift: Tensor, moment: Tensor, mean: Tensor) -> float:
    """`E |D x - s|^2`, summed over rows."""
    square = ((lost @ moment) * lost).sum() - 2 * (shift * (lost @ mean)).sum() + shift.square().sum()
    return max(0.0, float(square))


def _regression(own: Tensor, others: Tensor, damping: float) -> Tensor:
    """`(S + damping)^-1 C` in normalised columns; inputs that never change have no share."""
    if not bool(own.isfinite().all() and others.isfinite().all()):
        raise NumericError("NaN or Inf in the second moment of its inputs; look at the calibration data")
    scale = own.diagonal().clamp(min=0).sqrt()
    dead = scale <= 1e-12 * scale.max()
    scale = scale.masked_fill(dead, 1)
    normal = (own / scale / scale[:, None]).masked_fill(dead, 0).masked_fill(dead[:, None], 0)
    target = (others / scale[:, None]).masked_fill(dead[:, None], 0)
    for more in (damping, 10 * damping, 100 * damping, 1000 * damping, 10000 * damping):
        damped = normal.clone()
        damped.diagonal().add_(more + dead.to(damped.dtype))
        with one_thread():
            factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_solve(target, factor) / scale[:, None]
    raise NumericError(
        "the second moment of the inputs that stay cannot be factorised; give more calibration data"
    )
