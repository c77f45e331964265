"""From labels to numbers: sizes, offsets and index maps of a dimension when some units are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from secateur.core.axes.atoms import Atom, Axes, Label, size_of

__all__ = ["Extent", "Kept", "coordinates", "extent", "index_map", "positions"]

Kept = Mapping[Atom, Tensor]  # leaf -> ascending indices of the units that stay; a leaf left out stays whole


@dataclass(frozen=True)
class Extent:
    """An integer argument that follows the widths: the sum of the labels' sizes and a constant."""

    labels: tuple[Label, ...]
    plus: int = 0


def extent(axes: Axes, label: Label, kept: Kept) -> int:
    """Number of positions of the label when only the kept units remain."""
    return prod(_extent(axes, axes.root(atom), kept) for atom in label)


def _extent(axes: Axes, atom: Atom, kept: Kept) -> int:
    if atom.form == "product":
        return extent(axes, atom.parts, kept)
    if atom.form == "sum":
        return sum(_extent(axes, axes.root(part), kept) for part in atom.parts)
    return len(kept[atom]) if atom in kept else atom.size


def coordinates(axes: Axes, label: Label) -> dict[Atom, list[Int[Tensor, " size"]]]:
    """For each free leaf, the unit that every position of the dimension belongs to, -1 where to none.

    A leaf that meets itself in a product has one array for each time.
    """
    out: dict[Atom, list[Tensor]] = {}
    before, total = 1, size_of(label)
    if total == 0:
        return {}
    for atom in label:
        top = axes.root(atom)
        after = total // (before * top.size)
        for leaf, arrays in _coordinates(axes, top).items():
            spread = [array.repeat_interleave(after).repeat(before) for array in arrays]
            out.setdefault(leaf, []).extend(spread)
        before *= top.size
    return out


def _coordinates(axes: Axes, atom: Atom) -> dict[Atom, list[Tensor]]:
    if atom.form == "product":
        return coordinates(axes, atom.parts)
    if not atom.form:
        return {} if atom.reason is not None else {atom: [torch.arange(atom.size)]}
    out: dict[Atom, list[Tensor]] = {}
    start = 0
    for part in atom.parts:
        top = axes.root(part)
        for leaf, arrays in _coordinates(axes, top).items():
            mine = out.setdefault(leaf, [])
            while len(mine) < len(arrays):
                mine.append(torch.full((atom.size,), -1))
            for target, array in zip(mine, arrays, strict=False):
                target[start : start + top.size] = array
        start += top.size
    return out


def positions(axes: Axes, label: Label, kept: Kept) -> Int[Tensor, " left"] | None:
    """The positions of a dimension that stay, ascending; None when all do."""
    keep: Bool[Tensor, " size"] | None = None
    for leaf, arrays in coordinates(axes, label).items():
        if leaf not in kept:
            continue
        alive = torch.zeros(leaf.size + 1, dtype=torch.bool)  # one more: index -1 is "belongs to no unit"
        alive[kept[leaf]] = True
        alive[-1] = True
        for array in arrays:
            here = alive[array]
            keep = here if keep is None else keep & here
    return None if keep is None else keep.nonzero().flatten()


def index_map(axes: Axes, label: Label, leaf: Atom) -> Int[Tensor, "units width"]:
    """Row u holds the positions of the dimension that go when unit u of the leaf goes."""
    arrays = coordinates(axes, label)[leaf]
    if len(arrays) == 1:
        inside = (arrays[0] >= 0).nonzero().flatten()
        return inside[arrays[0][inside].argsort(stable=True)].view(leaf.size, -1)
    table = torch.stack([torch.stack([array == unit for array in arrays]).any(0) for unit in range(leaf.size)])
    return table.nonzero()[:, 1].view(leaf.size, -1)
