"""Prune and mend layer by layer while the calibration data flow through the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from secateur.core.select import apportion, smallest
from secateur.core.statistics import STATISTICS
from secateur.core.visit import visit
from secateur.core.where import Layer
from secateur.errors import NumericError, UsageError, nearest
from secateur.recipes import Recipe
from secateur.recover import Updated

__all__ = ["Choice", "Mended", "mend_", "own_biases", "update_statistics"]

# (layer, part, statistics of that part) -> the recipe's own scores of that part, (out, in)
Scores = Callable[[Layer, int, Mapping[str, Tensor]], Tensor]
# how the data flow, see `core.visit.visit`
Visit = Callable[[Any, Sequence[Layer], Sequence[str], Iterable[Any], Any], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mended:
    """What happened to each layer.

    Attributes:
        masks: parameter name -> mask, True = kept.
        damping: parameter name -> the multiple of the mean diagonal that was added to the second moment (the
            largest of its parts).
    """

    masks: dict[str, Tensor]
    damping: dict[str, float]


def update_statistics(recipe: Recipe) -> tuple[str, ...]:
    """The statistics that a recipe's update needs: its parameter names after the weight and `choose`."""
    if recipe.update is None or hasattr(recipe.update, "units_"):
        return ()
    names = tuple(inspect.signature(recipe.update).parameters)[2:]
    for name in names:
        if name not in STATISTICS:
            raise UsageError(
                f"update {recipe.update!r} asks for {name!r}, which is no known statistic; {nearest(name, STATISTICS)}"
            )
    return names


def mend_(
    model: nn.Module,
    layers: Sequence[Layer],
    recipe: Recipe,
    counts: Mapping[str, Tensor],
    names: Sequence[str],
    data: Iterable[Any],
    scores: Scores,
    visiting: Visit = visit,
) -> Mended:
    """Prune and update every layer in place, each calibrated on the already pruned stream.

    Rows of which nothing is pruned stay as they are, bit for bit.

    Args:
        layers: what is pruned.
        recipe: with an update.
        counts: kept units in each competition of each layer.
        names: statistics of the score and of the update.
        data: calibration batches.
        scores: the recipe's own score of one part.
        visiting: how the data flow; `core.visit`, or something that calls back as it does.

    Raises:
        NumericError: NaN or Inf in a layer's input or in what the update returns, naming the layer. Layers
            before it are changed by then; the caller puts them back.
    """
    masks: dict[str, Tensor] = {}
    damping: dict[str, float] = {}
    wanted = update_statistics(recipe)

    biases = own_biases(model, layers)

    def at(layer: Layer, known: Mapping[str, Tensor]) -> None:
        matrices = layer.layout.to_matrices(layer.weight.detach())
        bias = biases.get(layer.name)
        found = []
        for part, own in enumerate(_counts_of_parts(counts[layer.name], layer.layout.shape[0])):
            given = {name: known[name][part] for name in names}
            choose = Choice(
                recipe, own, layer.layout.shape[1:], partial(scores, layer, part, given), bias is not None
            )
            found.append(_update(layer, recipe, matrices[part], choose, {name: given[name] for name in wanted}))
        mask = layer.layout.from_matrices(torch.stack([part.mask for part in found])).contiguous()
        new = layer.layout.from_matrices(torch.stack([part.weight for part in found]))
        with torch.no_grad():
            layer.weight.copy_(new.masked_fill_(~mask, 0))
            if bias is not None:
                _shift_(bias.reshape(layer.layout.shape[:2]), [part.shift for part in found])
        masks[layer.name], damping[layer.name] = mask, max(part.damping for part in found)
        log.info("%s: damping %g of the mean diagonal", layer.name, damping[layer.name])

    visiting(model, layers, names, data, at)
    return Mended(masks, damping)


def own_biases(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Layer name -> its bias, for layers that have one which nothing else uses."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = {
        layer.name: getattr(layer.module, layer.layout.bias)
        for layer in layers
        if layer.layout.bias is not None
    }
    return {name: bias for name, bias in found.items() if uses[id(bias)] == 1}


def _shift_(bias: Tensor, shifts: Sequence[Tensor | None]) -> None:
    """Add to each part of a bias what its weights lost on average."""
    for row, shift in zip(bias, shifts, strict=True):
        if shift is not None:
            row.copy_(row.float() + shift)


def _update(
    layer: Layer, recipe: Recipe, weight: Tensor, choose: Choice, given: Mapping[str, Tensor]
) -> Updated:
    """One part, updated and checked: anybody may have written the update."""
    dense = weight.float()
    try:
        new, mask, *rest = recipe.update(dense, choose, **given)
    except NumericError as error:
        raise NumericError(f"{layer.name}: {error}") from None
    if mask.shape != weight.shape or new.shape != weight.shape:
        raise UsageError(
            f"{layer.name}: update {recipe.update!r} is to return a weight and a mask of shape {tuple(weight.shape)}, "
            f"got {tuple(new.shape)} and {tuple(mask.shape)}"
        )
    whole = mask.all(1)
    if bool(whole.any()):
        new = torch.where(whole[:, None], dense, new)
    shift = rest[1] if len(rest) > 1 else None
    if not all(bool(end.isfinite()) for each in (new, shift) if each is not None for end in each.aminmax()):
        raise NumericError(f"{layer.name}: the weight update gave NaN or Inf; give more calibration data")
    return Updated(new, mask, *rest)


def _counts_of_parts(counts: Tensor, parts: int) -> list[Tensor]:
    """The counts of each part of a layer; a count for the whole layer is shared out evenly."""
    if len(counts) == 1:
        total = int(counts[0])
        return [torch.tensor([share]) for share in apportion([max(total, 1)] * parts, total)]
    return list(counts.reshape(parts, -1))


@dataclass(frozen=True)
class Choice:
    """`choose(scores, columns)` of an update: a mask with the recipe's pattern and counts.

    Attributes:
        recipe: its pattern shapes the units.
        counts: kept units of each competition of this part.
        shape: `(out, in)` of this part.
        own_scores: the recipe's scores of this part, for `choose()`.
        bias: whether the layer adds a bias of its own.
    """

    recipe: Recipe
    counts: Tensor
    shape: tuple[int, int]
    own_scores: Callable[[], Tensor]
    bias: bool = False

    @cached_property
    def together(self) -> int:
        """The fewest columns that hold whole units: m of N:M, the width of blocks, all columns of a row."""
        columns = self.shape[1]
        units = self._units(columns)
        for width in range(1, columns // 2 + 1):
            if columns % width == 0 and self._units(width) * (columns // width) == units:
                return width
        return columns

    def _units(self, columns: int) -> int:
        try:
            return self.recipe.pattern.pool(torch.empty(self.shape[0], columns, device="meta")).numel()
        except UsageError:
            return -1  # so few columns cannot be cut

    @property
    def swaps(self) -> int | None:
        """Columns within which weights of a row may trade places; None where units are not single weights."""
        if self._units(self.shape[1]) != self.shape[0] * self.shape[1]:
            return None
        return self.together if self.recipe.fixed_by_pattern else self.shape[1]

    def width(self, block: int) -> int:
        """How many columns to choose at a time; as late as possible where every group competes for itself."""
        if self.recipe.fixed_by_pattern:
            return self.together
        return min(self.shape[1], max(1, block // self.together) * self.together)

    def __call__(self, scores: Tensor | None = None, columns: slice | None = None) -> Bool[Tensor, "out in"]:
        """The mask that keeps the highest scores; the recipe's own score without any; of some columns only."""
        scores = self.own_scores() if scores is None else scores.float()
        if not all(bool(end.isfinite()) for end in scores.aminmax()):
            raise NumericError("NaN or Inf among the scores of the weight update; give more calibration data")
        pooled = self.recipe.pattern.pool(scores)
        if self.recipe.fixed_by_pattern:
            competing, keep = pooled, self.counts[:1].expand(pooled.shape[0])
        else:
            competing = pooled.reshape(1, -1) if len(self.counts) == 1 else pooled
            keep = _share(self.counts, competing.shape[1], columns or slice(0, self.shape[1]), self.shape[1])
        kept = smallest(competing, competing.shape[1] - keep).logical_not_().reshape(pooled.shape)
        return self.recipe.pattern.spread(kept, (scores.shape[0], scores.shape[1]))


def _share(counts: Tensor, units: int, columns: slice, total: int) -> Tensor:
    """How many of the `units` in these columns are kept, so that the shares of all blocks sum to the counts."""
    whole = units * total // (columns.stop - columns.start)
    before = whole * columns.start // total
    return (2 * counts * (before + units) + whole) // (2 * whole) - (2 * counts * before + whole) // (2 * whole)
