"""The neurons of one feed-forward matched with those of another, by weights or by what they do on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.feedforward import FeedForward
from secateur.core.statistics import Padding, evaluating, forward, observe
from secateur.errors import NumericError, UsageError

__all__ = ["Align", "match", "orders"]

Align = Literal["weights", "activations"]
Pair = tuple[FeedForward, FeedForward]  # the one whose order is kept, the one that is put in order


def orders(
    model: nn.Module, pairs: Sequence[Pair], align: Align, data: Iterable[Any] | None
) -> dict[str, Int[Tensor, " neuron"]]:
    """For the second feed-forward of each pair the order of its neurons that fits the first best.

    Returns:
        Path of its block -> for each place the neuron that comes there. Pairs of a feed-forward with itself are left
        out.

    Raises:
        UsageError: no data for "activations", neurons of different number, a mixture of experts, no scipy.
        NumericError: NaN or Inf among weights or activations.
    """
    told = [(first, second) for first, second in pairs if first is not second]
    for first, second in told:
        one, other = first.closing.layout.shape[2], second.closing.layout.shape[2]
        if one != other:
            raise UsageError(
                f"{first.block.path} and {second.block.path} have {one} and {other} neurons and cannot be aligned"
            )
    if align == "weights":
        gains = {second.block.path: first.features() @ second.features().t() for first, second in told}
    elif align == "activations":
        if data is None:
            raise UsageError("aligning neurons by their activations needs calibration data; pass data=")
        gains = _correlations(model, told, data)
    else:
        raise UsageError(f"align={align!r} is not known; expected 'weights' or 'activations'")
    return {path: match(gain, path) for path, gain in gains.items()}


def match(gain: Float[Tensor, "neuron neuron"], name: str = "neurons") -> Int[Tensor, " neuron"]:
    """The assignment of columns to rows with the largest total gain (Hungarian method; ties by scipy's order).

    Raises:
        UsageError: scipy is not installed.
        NumericError: NaN or Inf.

    Example:
        >>> match(torch.tensor([[0.0, 1.0], [2.0, 0.0]])).tolist()
        [1, 0]
    """
    if not bool(gain.isfinite().all()):
        raise NumericError(
            f"{name}: NaN or Inf when its neurons are compared; look at its weights and the data"
        )
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UsageError("aligning neurons needs the extra align: pip install 'secateur[align]'") from error
    _, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.as_tensor(columns)


class _Moments:
    """Running first and second moments of the neurons of one feed-forward, and their products with another's."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: list[Tensor] = []

    def add(self, one: Tensor, other: Tensor) -> None:
        one, other = one.double(), other.double()
        new = [one.sum(0), one.square().sum(0), other.sum(0), other.square().sum(0), one.t() @ other]
        self.sums = [old + more for old, more in zip(self.sums, new, strict=True)] if self.sums else new
        self.tokens += one.shape[0]

    def correlation(self) -> Float[Tensor, "neuron neuron"]:
        """Pearson's; 0 for a neuron that never changes."""
        first, first_squares, second, second_squares, products = (each / self.tokens for each in self.sums)
        spread = (first_squares - first.square()).clamp(min=0).sqrt()
        other = (second_squares - second.square()).clamp(min=0).sqrt()
        scale = spread[:, None] * other
        return torch.where(scale > 0, (products - first[:, None] * second) / scale.clamp(min=1e-300), 0.0)


def _correlations(model: nn.Module, pairs: Sequence[Pair], data: Iterable[Any]) -> dict[str, Tensor]:
    """How the neurons of each pair vary together over all real tokens.

    Cost: one forward pass; memory for the neurons of one batch, and a matrix of neurons by neurons a pair.
    """
    if isinstance(data, Mapping):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    feeds = {feed.block.path: feed for pair in pairs for feed in pair}
    moments = {second.block.path: _Moments() for _, second in pairs}
    seen: dict[str, list[Tensor]] = {}
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        padding = Padding(model, stack)
        for path, feed in feeds.items():
            receive = _keeping(seen, path)
            observe(feed.closing, padding, receive, stack)
        for batch in data:
            batches += 1
            seen.clear()
            padding.look_at(batch)
            forward(model, batch)
            for first, second in pairs:
                one, other = first.block.path, second.block.path
                if one not in seen or other not in seen:
                    raise UsageError(f"{one if one not in seen else other}: no token of a batch reached it")
                moments[other].add(torch.cat(seen[one]), torch.cat(seen[other]))
    if batches == 0:
        raise UsageError("data holds no batch; aligning by activations needs at least one")
    return {path: each.correlation() for path, each in moments.items()}


def _keeping(seen: dict[str, list[Tensor]], path: str) -> Any:
    return lambda inputs, rows: seen.setdefault(path, []).append(rows()[0])
