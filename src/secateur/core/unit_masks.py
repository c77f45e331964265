"""From masks back to units: which units do these zeros remove, and is every one of them whole?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from secateur.core.axes.found import Member, Units
from secateur.core.masks import Masks
from secateur.core.units import Analysis, outer
from secateur.errors import UsageError, nearest

__all__ = ["PartialUnitsError", "keep_of", "whole_units"]


class PartialUnitsError(UsageError):
    """Masks prune single weights of units, or some of the slices that belong together."""


def whole_units(analysis: Analysis, masks: Masks) -> dict[str, Tensor]:
    """The units that masks leave something of; beside whole units, single weights may be pruned as well.

    Args:
        analysis: From `analyse`, of the model that the masks belong to.
        masks: True = kept, under any name of a tied tensor. A parameter without a mask is kept whole.

    Returns:
        Axis name -> ascending indices of the units that stay, for every axis that loses some.

    Raises:
        UsageError: a mask of another model; an axis of which nothing is left.
    """
    return _left(analysis, _Alive(_by_first_name(analysis, masks)))


def _left(analysis: Analysis, alive: _Alive) -> dict[str, Tensor]:
    keep: dict[str, Tensor] = {}
    for units in analysis.units:
        dead = torch.ones(units.size, dtype=torch.bool)
        for member in units.members:
            if member.is_parameter:
                dead &= alive.dead_units(member)
        if dead.all():
            raise UsageError(
                f"{units.name}: the masks remove all {units.size} units, first seen in {units.members[0].name}; "
                "keep at least one."
            )
        if dead.any():
            keep[units.name] = (~dead).nonzero().flatten()
    return keep


def keep_of(analysis: Analysis, masks: Masks) -> dict[str, Tensor]:
    """The units that masks keep, the inverse of `Analysis.masks`; zeros that are no whole units are refused.

    Args:
        analysis: From `analyse`, of the model that the masks belong to.
        masks: True = kept, under any name of a tied tensor. A parameter without a mask is kept whole.

    Returns:
        Axis name -> ascending indices of the units that stay, for every axis that loses some.

    Raises:
        UsageError: a mask of another model; zeros that are not whole units (the message names the layer and
            the nearest unit); an axis of which nothing is left.

    Cost:
        A few passes over the masks, and a boolean for each of their numbers.

    Example:
        >>> from torch import nn
        >>> from secateur.core.units import analyse
        >>> found = analyse(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(4, 3),))
        >>> keep_of(found, found.masks({"feed-forward units of 0,2": [1, 5]}))
        {'feed-forward units of 0,2': tensor([1, 5])}
    """
    given = _by_first_name(analysis, masks)
    alive = _Alive(given)
    keep = _left(analysis, alive)
    index = analysis.kept_indices(keep)
    for name, mask in given.items():
        meant = outer(tuple(mask.shape), index.get(name, ()))
        if not torch.equal(mask, meant):
            raise PartialUnitsError(_broken(analysis, alive, name, mask, meant))
    return keep


def _by_first_name(analysis: Analysis, masks: Masks) -> dict[str, Tensor]:
    """The masks that hold a zero, on the CPU, under each tensor's first name."""
    first = analysis.first_names()
    shapes = analysis.shapes()
    out: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name not in first:
            if bool(mask.all()):
                continue
            raise UsageError(
                f"mask of {name}: the analysed computation uses no parameter of that name; {nearest(name, first)}"
            )
        if tuple(mask.shape) != shapes[name]:
            raise UsageError(
                f"mask of {name}: expected shape {shapes[name]}, got {tuple(mask.shape)}; these masks belong to "
                "another model"
            )
        mask = mask.cpu()
        known = out.get(first[name])
        if known is not None and not torch.equal(known, mask):
            names = " and ".join(other for other in masks if first.get(other) == first[name])
            raise UsageError(f"{names} are one tensor; their masks differ. Give one of them.")
        if not bool(mask.all()):
            out[first[name]] = mask
    return out


class _Alive:
    """Positions of each dimension that keep anything, computed once."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = masks
        self._found: dict[tuple[str, int], Tensor] = {}

    def positions(self, name: str, dim: int) -> Tensor:
        """For every position of a dimension whether the mask keeps any of it."""
        if (name, dim) not in self._found:
            mask = self.masks[name]
            others = [d for d in range(mask.dim()) if d != dim]
            self._found[name, dim] = mask.any(others) if others else mask
        return self._found[name, dim]

    def dead_units(self, member: Member) -> Tensor:
        """For every unit whether nothing of it is left in this dimension."""
        if member.name not in self.masks:
            return torch.zeros(len(member.indices), dtype=torch.bool)
        return ~self.positions(member.name, member.dim)[member.indices].any(1)


@dataclass(frozen=True)
class _Near:
    """A unit that some stray zeros belong to."""

    units: Units
    index: int
    masked: int  # positions in the whole unit that are zero
    size: int
    missing: str  # a tensor where the unit is not zero

    @property
    def share(self) -> float:
        return self.masked / self.size


def _broken(analysis: Analysis, alive: _Alive, name: str, mask: Tensor, meant: Tensor) -> str:
    stray = ~mask & meant
    count = int(stray.sum())
    if not count:  # an axis was taken for removed, and this tensor keeps a part of it
        stray = mask & ~meant
        at = tuple(stray.nonzero()[0].tolist())
        return f"{name}: the weight at {at} is kept, although the masks remove its unit everywhere else."
    near = max(_near(analysis, alive, name, stray), key=lambda unit: unit.share, default=None)
    at = tuple(stray.nonzero()[0].tolist())
    told = f"{name}: {count} pruned weights, the first at {at}, are no whole units"
    if near is None:
        why = next(
            (str(frozen.reason) for frozen in analysis.frozen if any(n == name for n, _ in frozen.members)), ""
        )
        return f"{told}; no prunable axis runs through this tensor" + (f" ({why})." if why else ".")
    return (
        f"{told}; nearest is unit {near.index} of {near.units.name!r}, of which {near.masked} of {near.size} "
        f"weights are pruned"
        + (f", none or not all in {near.missing}" if near.missing else "")
        + ". Prune whole units: analysis.masks(keep) makes such masks."
    )


def _near(analysis: Analysis, alive: _Alive, name: str, stray: Tensor) -> list[_Near]:
    """For each axis through the tensor the unit with most of its stray zeros, as part of the whole unit."""
    out = []
    for units in analysis.units:
        for member in units.members:
            if member.name != name:
                continue
            others = [d for d in range(stray.dim()) if d != member.dim]
            here = (stray.sum(others) if others else stray.long())[member.indices].sum(1)
            index = int(here.argmax())
            if here[index]:
                out.append(_measured(analysis, units, index, alive))
    return out


def _measured(analysis: Analysis, units: Units, index: int, alive: _Alive) -> _Near:
    shapes = analysis.shapes()
    masked = size = 0
    missing = ""
    for member in units.members:
        if not member.is_parameter:
            continue
        shape = shapes[member.name]
        here = len(member.indices[index]) * (prod(shape) // shape[member.dim])
        zero = 0
        if member.name in alive.masks:
            part = alive.masks[member.name].index_select(member.dim, member.indices[index])
            zero = int((~part).sum())
        if zero < here and not missing:
            missing = member.name
        masked, size = masked + zero, size + here
    return _Near(units, index, masked, size, missing)
