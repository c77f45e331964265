"""One analysis of a whole model, or several of its submodules: axes, kept units and tensors under full names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.axes.atoms import Atom
from secateur.core.masks import Masks
from secateur.core.unit_masks import keep_of
from secateur.core.units import Analysis, Units
from secateur.deploy.slices import Index
from secateur.errors import UsageError, nearest

__all__ = ["Counts", "Parts", "complete"]

Counts = Mapping[Atom, Tensor]  # axis atom -> ascending units that stay, for axes that lose some


@dataclass(frozen=True)
class Parts:
    """Analyses by module path; the whole model is at ""."""

    analyses: Mapping[str, Analysis]

    @property
    def whole(self) -> Analysis | None:
        """The analysis of the whole model, None where it had to be taken apart."""
        return self.analyses.get("")

    def full(self, prefix: str, name: str) -> str:
        """A tensor's name in the whole model."""
        return f"{prefix}.{name}" if prefix else name

    def axes(self) -> list[tuple[str, Units]]:
        """Every axis with a name that is unique in the model."""
        return [pair for prefix in self.analyses for pair in self._axes_of(prefix)]

    def kept(self, masks: Masks) -> dict[Atom, Tensor]:
        """The units that masks keep.

        Raises:
            UsageError: zeros that are no whole units.
        """
        out: dict[Atom, Tensor] = {}
        taken: set[str] = set()
        for prefix, analysis in self.analyses.items():
            start = f"{prefix}." if prefix else ""
            mine = {name[len(start) :]: mask for name, mask in masks.items() if name.startswith(start)}
            taken |= {start + name for name in mine}
            out |= analysis.leaves(keep_of(analysis, Masks(mine)))
        rest = Masks({name: mask for name, mask in masks.items() if name not in taken and not bool(mask.all())})
        if rest:
            keep_of(next(iter(self.analyses.values())), rest)  # says that no analysed part has such a tensor
        return out

    def named(self, keep: Mapping[str, Any]) -> dict[Atom, Tensor]:
        """The units to keep, given by axis name.

        Raises:
            UsageError: an unknown axis, an index out of range or given twice, or nothing left.
        """
        known = {name: (prefix, units) for prefix in self.analyses for name, units in self._axes_of(prefix)}
        out: dict[Atom, Tensor] = {}
        for name, kept in keep.items():
            if name not in known:
                raise UsageError(f"{name!r} is none of the {len(known)} prunable axes; {nearest(name, known)}.")
            prefix, units = known[name]
            out |= self.analyses[prefix].leaves({units.name: kept})
        return out

    def _axes_of(self, prefix: str) -> list[tuple[str, Units]]:
        return [(f"{prefix}: {u.name}" if prefix else u.name, u) for u in self.analyses[prefix].units]

    def by_name(self, prefix: str, counts: Counts) -> dict[str, Tensor]:
        """Axis name within one part -> units that stay."""
        return {u.name: counts[u.leaf] for u in self.analyses[prefix].units if u.leaf in counts}

    def index(self, counts: Counts) -> Index:
        """Kept positions of every tensor that loses some, under all of its names."""
        out: dict[str, tuple[Tensor | None, ...]] = {}
        for prefix, analysis in self.analyses.items():
            for name, index in analysis.kept_indices(self.by_name(prefix, counts)).items():
                out[self.full(prefix, name)] = index
        return out


def complete(size: int, kept: Tensor, count: int) -> Tensor:
    """The kept units and the first others, `count` in all, ascending."""
    others = torch.ones(size, dtype=torch.bool)
    others[kept] = False
    more = others.nonzero().flatten()[: count - len(kept)]
    return torch.cat([kept, more]).sort().values
