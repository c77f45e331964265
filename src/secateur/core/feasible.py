"""Counts that every place can have: never less than its least, in its steps, equal where they are to be alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.core.select import Candidates

__all__ = ["coarsest", "feasible", "neighbours"]

Counts = dict[str, Int[Tensor, " competition"]]


@dataclass(frozen=True)
class _Group:
    """Places that keep equally many units."""

    names: tuple[str, ...]
    wanted: float
    options: tuple[int, ...]  # ascending
    weights: int  # that one unit of each of them holds

    @property
    def nearest(self) -> int:
        """Place of the option nearest to what is wanted; of two the larger."""
        return min(range(len(self.options)), key=lambda at: (abs(self.options[at] - self.wanted), -at))

    def regret(self, place: int) -> float:
        """How far from what is wanted, in steps."""
        return abs(self.options[place] - self.wanted) / max(1, self.options[-1] - self.options[0])


def feasible(layers: Mapping[str, Candidates], counts: Counts, keep: int | None) -> Counts:
    """The counts nearest to the wanted ones that every place can have.

    Where all can be had as they are, they stay; so an allocator's promises, such as counts that only grow, hold
    unless a place asks for multiples or for equal widths.

    Args:
        layers: the units of every place, with their `least`, `step` and `alike`.
        counts: what an allocator wants; one number for each place that asks for anything.
        keep: weights to keep in all places together, approached as nearly as whole steps allow; None where
            the allocator decided how many.

    Example:
        >>> layer = Candidates((1, 20), 3, lambda: torch.rand(1, 20), least=1, step=8)
        >>> feasible({"a": layer, "b": layer}, {"a": torch.tensor([13]), "b": torch.tensor([11])}, 72)
        {'a': tensor([16]), 'b': tensor([8])}
    """
    bound = {name: layer for name, layer in layers.items() if layer.least or layer.step > 1 or layer.alike}
    groups = _groups(bound, counts)
    chosen = [group.nearest for group in groups]
    exact = all(group.options[at] == group.wanted for group, at in zip(groups, chosen, strict=True))
    if exact and not any(len({int(counts[name]) for name in group.names}) > 1 for group in groups):
        return counts
    if keep is not None:
        others = sum(int(counts[name].sum()) * layers[name].cells for name in layers if name not in bound)
        chosen = _approach(groups, chosen, keep - others)
    found = dict(counts)
    for group, at in zip(groups, chosen, strict=True):
        found |= {name: torch.tensor([group.options[at]]) for name in group.names}
    return found


def neighbours(layers: Mapping[str, Candidates], counts: Counts) -> Iterator[Counts]:
    """Counts in which one place, with those that are to be like it, keeps its next smaller or larger number of units.

    Example:
        >>> layer = Candidates((1, 9), 1, lambda: torch.rand(1, 9), least=1, step=4)
        >>> [int(found["a"]) for found in neighbours({"a": layer}, {"a": torch.tensor([8])})]
        [4, 9]
    """
    for group in _groups(layers, counts):
        at = group.nearest
        for other in (at - 1, at + 1):
            if 0 <= other < len(group.options):
                yield dict(counts) | {name: torch.tensor([group.options[other]]) for name in group.names}


def coarsest(layers: Mapping[str, Candidates]) -> int:
    """Weights in the largest step that counts can take: totals cannot be met more finely than that."""
    sizes: dict[str, int] = {}
    for name, layer in layers.items():
        key = layer.alike or name
        sizes[key] = sizes.get(key, 0) + layer.cells * min(layer.step, max(1, layer.units))
    return max(sizes.values(), default=1)


def _groups(layers: Mapping[str, Candidates], counts: Counts) -> list[_Group]:
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.alike or name, []).append(name)
    found = []
    for names in members.values():
        first = layers[names[0]]
        size = min(layers[name].units for name in names)
        steps = [k for k in range(0, size, first.step) if k >= first.least]
        wanted = sum(int(counts[name]) for name in names) / len(names)
        weights = sum(layers[name].cells for name in names)
        found.append(_Group(tuple(names), wanted, (*steps, size), weights))
    return found


def _approach(groups: Sequence[_Group], chosen: list[int], keep: int) -> list[int]:
    """Move one group after another to its next option, that with the least regret first, while it helps."""
    chosen = list(chosen)

    def excess() -> int:
        return sum(g.options[at] * g.weights for g, at in zip(groups, chosen, strict=True)) - keep

    while over := excess():
        way = -1 if over > 0 else 1
        moves = []
        for place, (group, at) in enumerate(zip(groups, chosen, strict=True)):
            if 0 <= at + way < len(group.options):
                moved = (group.options[at + way] - group.options[at]) * group.weights
                if abs(over + moved) < abs(over):
                    moves.append((group.regret(at + way) - group.regret(at), place))
        if not moves:
            break
        chosen[min(moves)[1]] += way
    return chosen
