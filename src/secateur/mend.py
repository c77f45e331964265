"""Prune and mend layer by layer while the calibration data flow through the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.select import apportion, smallest
from secateur.core.statistics import STATISTICS
from secateur.core.visit import visit
from secateur.core.where import Layer
from secateur.errors import NumericError, UsageError, nearest
from secateur.recipes import Recipe

__all__ = ["mend_", "update_statistics"]

# (layer, part, statistics of that part) -> the recipe's own scores of that part, (out, in)
Scores = Callable[[Layer, int, Mapping[str, Tensor]], Tensor]


def update_statistics(recipe: Recipe) -> tuple[str, ...]:
    """The statistics that a recipe's update needs: its parameter names after the weight and `choose`."""
    if recipe.update is None:
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
) -> dict[str, Tensor]:
    """Prune and update every layer in place, each calibrated on the already pruned stream.

    Args:
        layers: what is pruned.
        recipe: with an update.
        counts: kept units in each competition of each layer.
        names: statistics of the score and of the update.
        data: calibration batches.
        scores: the recipe's own score of one part.

    Returns:
        One mask for each layer, True = kept.

    Raises:
        NumericError: NaN or Inf in what the update returns, naming the layer.
    """
    kept: dict[str, Tensor] = {}
    wanted = update_statistics(recipe)

    def at(layer: Layer, known: Mapping[str, Tensor]) -> None:
        matrices = layer.layout.to_matrices(layer.weight.detach())
        weights, masks = [], []
        for part, own in enumerate(_counts_of_parts(counts[layer.name], layer.layout.shape[0])):
            given = {name: known[name][part] for name in names}
            choose = _chooser(recipe, own, layer.layout.shape[2], partial(scores, layer, part, given))
            found = recipe.update(matrices[part].float(), choose, **{name: given[name] for name in wanted})  # type: ignore[misc]
            _check(layer, *found)
            weights.append(found[0])
            masks.append(found[1])
        kept[layer.name] = layer.layout.from_matrices(torch.stack(masks)).contiguous()
        new = layer.layout.from_matrices(torch.stack(weights)).masked_fill(~kept[layer.name], 0)
        with torch.no_grad():
            layer.weight.copy_(new)

    visit(model, layers, names, data, at)
    return kept


def _counts_of_parts(counts: Tensor, parts: int) -> list[Tensor]:
    """The counts of each part of a layer; a count for the whole layer is shared out evenly."""
    if len(counts) == 1:
        total = int(counts[0])
        return [torch.tensor([share]) for share in apportion([max(total, 1)] * parts, total)]
    return list(counts.reshape(parts, -1))


def _chooser(
    recipe: Recipe, counts: Tensor, total: int, own_scores: Callable[[], Tensor]
) -> Callable[..., Tensor]:
    """`choose(scores, columns)`: a mask with the recipe's pattern and counts.

    Args:
        counts: kept units of each competition of this part.
        total: columns of this part.
        own_scores: the recipe's scores of this part, for `choose()`.
    """
    pattern: Any = recipe.pattern

    def choose(scores: Tensor | None = None, columns: slice | None = None) -> Tensor:
        scores = own_scores() if scores is None else scores
        pooled = pattern.pool(scores)
        competing = pooled.reshape(1, -1) if len(counts) == 1 else pooled
        if recipe.fixed_by_pattern:
            keep = torch.full((pooled.shape[0],), int(counts[0]))
            competing = pooled
        else:
            keep = _share(counts, competing.shape[1], columns or slice(0, total), total)
        kept = smallest(competing, competing.shape[1] - keep).logical_not().reshape(pooled.shape)
        return pattern.spread(kept, (scores.shape[0], scores.shape[1]))

    return choose


def _share(counts: Tensor, units: int, columns: slice, total: int) -> Tensor:
    """How many of the `units` in these columns are kept, so that the shares of all blocks sum to the counts."""
    whole = units * total // (columns.stop - columns.start)
    before = whole * columns.start // total
    return (2 * counts * (before + units) + whole) // (2 * whole) - (2 * counts * before + whole) // (2 * whole)


def _check(layer: Layer, weight: Tensor, mask: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise NumericError(f"{layer.name}: the weight update gave NaN or Inf; give more calibration data")
