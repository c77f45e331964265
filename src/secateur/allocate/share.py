"""Allocators that share out a given number of kept weights.

Each takes the competing units of every layer and the number of weights to keep in all of them, and returns
how many units to keep in each competition: one number a layer where the whole layer competes, one number a
row where rows compete for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from secateur.core.select import Candidates, apportion, cut_by_part

__all__ = ["globally", "per_layer", "per_row"]

Counts = dict[str, Int[Tensor, " competition"]]


def per_layer(layers: Mapping[str, Candidates], keep: int) -> Counts:
    """Every layer at the same sparsity; all units of a layer compete with each other.

    Args:
        layers: the units of every layer.
        keep: weights to keep in all layers together.

    Returns:
        For each layer one count.

    Example:
        >>> layer = Candidates((4, 8), 1, lambda: torch.rand(4, 8))
        >>> per_layer({"a": layer, "b": layer}, 33)
        {'a': tensor([17]), 'b': tensor([16])}
    """
    return {name: torch.tensor([units]) for name, units in _units_of_layers(layers, keep).items()}


def per_row(layers: Mapping[str, Candidates], keep: int) -> Counts:
    """Every row of every layer at the same sparsity; only units of one row compete. Wanda's choice.

    Where a row cannot be cut exactly (7 columns in half), the first rows keep one more, so that the total
    stays exact.
    """
    counts = {}
    for name, units in _units_of_layers(layers, keep).items():
        rows = layers[name].shape[0]
        counts[name] = torch.full((rows,), units // rows)
        counts[name][: units % rows] += 1
    return counts


def globally(layers: Mapping[str, Candidates], keep: int) -> Counts:
    """All units of all layers compete: one cut through the whole model.

    Exact, without sorting or concatenating when all units hold equally many weights (the scores are computed
    anew in each of about two passes). Units of different sizes are ranked by their mean score
    and taken until the asked number of weights is reached, within one unit.
    """
    if len({layer.cells for layer in layers.values()}) > 1:
        return _globally_unequal(layers, keep)
    cells = next(iter(layers.values())).cells
    units = sum(layer.units for layer in layers.values())
    cut = units - _rounded(keep, cells)
    if cut == 0:
        return {name: torch.tensor([layer.units]) for name, layer in layers.items()}
    value, below, equal = cut_by_part([layer.keys for layer in layers.values()], cut)
    ties, counts = cut - sum(below), {}
    for (name, layer), under, at in zip(layers.items(), below, equal, strict=True):
        tied = min(ties, at)
        ties -= tied
        layer.guess.value = value
        counts[name] = torch.tensor([layer.units - under - tied])
    return counts


def _globally_unequal(layers: Mapping[str, Candidates], keep: int) -> Counts:
    """Whole rows of layers of different widths: few units, so they are simply sorted."""
    scores = np.concatenate([layer.scores().reshape(-1).cpu().numpy() for layer in layers.values()])
    owner = np.repeat(np.arange(len(layers)), [layer.units for layer in layers.values()])
    cells = np.array([layer.cells for layer in layers.values()])[owner]
    best = np.argsort(scores, kind="stable")[::-1]
    best = best[scores[best] > -np.inf]  # what is pruned already is never taken to come closer to the target
    return _take(layers, best, owner, cells, keep)


def _take(
    layers: Mapping[str, Candidates], order: np.ndarray, owner: np.ndarray, cells: np.ndarray, keep: int
) -> Counts:
    """Keep units in this order until `keep` weights are reached as nearly as possible."""
    reached = np.concatenate([[0], np.cumsum(cells[order])])
    count = int(np.argmin(np.abs(reached - keep)))
    kept = np.bincount(owner[order[:count]], minlength=len(layers))
    return {name: torch.tensor([int(n)]) for name, n in zip(layers, kept, strict=True)}


def _units_of_layers(layers: Mapping[str, Candidates], keep: int) -> dict[str, int]:
    """Kept units of each layer at one common sparsity, their weights summing to `keep` within one unit."""
    units = [layer.units for layer in layers.values()]
    sizes = {layer.cells for layer in layers.values()}
    if len(sizes) == 1:
        return dict(zip(layers, apportion(units, _rounded(keep, sizes.pop())), strict=True))
    # the order of Webster's method, see `apportion`, with units that weigh differently
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in units])
    owner = np.repeat(np.arange(len(units)), units)
    cells = np.array([layer.cells for layer in layers.values()])[owner]
    counts = _take(layers, np.argsort(place, kind="stable"), owner, cells, keep)
    return {name: int(count) for name, count in counts.items()}


def _rounded(keep: int, cells: int) -> int:
    return (2 * keep + cells) // (2 * cells)
