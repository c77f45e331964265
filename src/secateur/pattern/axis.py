"""One axis as a place where units compete: scores of its members pooled into units, units spread into masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from secateur.core.axes.found import Member, Units
from secateur.core.masks import Masks
from secateur.core.matrix import Layout
from secateur.core.site import Look, Scored
from secateur.core.unit_masks import keep_of
from secateur.core.units import Analysis
from secateur.core.where import Layer
from secateur.errors import UsageError

__all__ = ["AxisSite", "NothingToLookAtError", "columns_of"]


class NothingToLookAtError(UsageError):
    """No member of an axis is anything that a score looks at."""


@dataclass(frozen=True)
class AxisSite:
    """All units of one axis compete with each other.

    Attributes:
        units: the axis.
        analysis: where it was found.
        sources: the members that the score looks at, each with its layer and, for evidence about inputs, with the
            columns that every unit feeds.
        least, step, alike: see `core.site.Site`.
    """

    units: Units = field(repr=False)
    analysis: Analysis = field(repr=False)
    sources: tuple[tuple[Member, Layer, Tensor | None], ...] = field(repr=False)
    least: int
    step: int
    alike: str
    noun = ("axis", "axes")

    @classmethod
    def of(
        cls, model: nn.Module, analysis: Analysis, units: Units, known: Mapping[str, Layer], look: Look, over: str,
        least: int, step: int, alike: str,
    ) -> AxisSite:  # fmt: skip
        """The site of an axis, its sources found.

        Raises:
            UsageError: none of its members is anything that the score looks at.
        """
        sources = tuple(_sources(model, units, known, look, over))
        if not sources:
            raise NothingToLookAtError(_nothing_to_look_at(units, look, over))
        return cls(units, analysis, sources, least, step, alike)

    @property
    def name(self) -> str:
        """The axis's name."""
        return self.units.name

    @property
    def shape(self) -> tuple[int, int]:
        """One competition of all units."""
        return 1, self.units.size

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Matrices that the score looks at, each once."""
        return tuple({layer.name: layer for _, layer, _ in self.sources}.values())

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that carry the axis."""
        return tuple(dict.fromkeys(member.name for member in self.units.members if member.is_parameter))

    @property
    def cells(self) -> int:
        """Parameters in one unit; where it crosses another axis a parameter counts on both."""
        return self.analysis.unit_size(self.units.name)

    def pool(self, scored: Callable[[Layer], Scored]) -> Float[Tensor, "competition unit"]:
        """Each unit's score over all of its sources: sums of their numbers, finished as the score says."""
        totals: dict[int, Tensor] = {}  # rows of evidence -> (row, unit)
        counts: dict[int, int] = {}
        for member, layer, columns in self.sources:
            said = scored(layer)
            rows, count = _by_unit(said, member, layer, columns)
            at = rows.shape[0]
            totals[at] = rows if at not in totals else totals[at] + rows
            counts[at] = counts.get(at, 0) + count
            look = said.look
        found = [look.finish(totals[at], counts[at]).mean(0) for at in totals]
        return torch.stack(found).mean(0)[None].float()

    def spread(self, kept: Bool[Tensor, "competition unit"]) -> Mapping[str, Tensor]:
        """Masks of all parameters that carry the axis."""
        return self.analysis.masks({self.name: kept[0].nonzero().flatten()})

    def pruned(self, masks: Mapping[str, Tensor]) -> Bool[Tensor, "competition unit"] | None:
        """Units that earlier masks prune."""
        mine = {member.name for member in self.units.members} & set(masks)
        if not mine:
            return None
        gone = torch.zeros(1, self.units.size, dtype=torch.bool)
        kept = keep_of(self.analysis, Masks(masks)).get(self.name)
        if kept is not None:
            gone[:] = True
            gone[0, kept] = False
        return gone


def _sources(model: nn.Module, units: Units, known: Mapping[str, Layer], look: Look, over: str) -> Any:
    """Members to score: norms for scales, columns for inputs, else matrices, and vectors where there are none."""
    vectors = []
    found = False
    for member in units.members:
        if not member.is_parameter:
            continue
        layer = known.get(member.name) or _bare(model, member.name)
        if look.about == "scales":
            if isinstance(layer.module, nn.modules.batchnorm._BatchNorm) and layer.layout.name == "weight":
                yield member, layer, None
            continue
        if layer.weight.dim() < 2:
            vectors.append((member, layer, None))
            continue
        if look.needs_inputs and layer.layout.rows is None:
            continue
        columns = columns_of(layer, member) if look.about == "inputs" or over != "all" else None
        if look.about == "inputs" and columns is not None:
            yield member, layer, columns
        elif look.about == "weights" and over in ("all", "writers" if columns is None else "readers"):
            found = True
            yield member, layer, None
    if look.about == "weights" and over == "all" and not look.needs_inputs and not found:
        yield from vectors


def _bare(model: nn.Module, name: str) -> Layer:
    """A parameter that is no matrix of a known layer, seen as one row a slice; it has no input activations."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    shape = getattr(module, last).shape
    rows = shape[0] if len(shape) > 1 else 1
    layout = Layout(
        last,
        (1, rows, prod(shape) // max(1, rows)),
        lambda tensor: tensor.reshape(1, rows, -1),
        lambda matrices: matrices.reshape(shape),
        None,
    )
    return Layer(name, path, module, layout, "other")


def columns_of(layer: Layer, member: Member) -> Int[Tensor, "unit column"] | None:
    """The input columns, `part * in + column`, that each unit feeds; None where the member is no input of the layer."""
    part, out, columns = layer.layout.shape
    numbers = torch.arange(part * columns, dtype=torch.int32).view(part, 1, columns).expand(part, out, columns)
    placed = layer.layout.from_matrices(numbers)
    for dim in range(placed.dim()):  # a slice of every dimension along which the columns do not change
        line = placed[tuple(slice(None) if d == dim else 0 for d in range(placed.dim()))]
        if dim != member.dim and bool((line == line[0]).all()):
            placed = placed.narrow(dim, 0, 1)
    at = placed.movedim(member.dim, 0).reshape(placed.shape[member.dim], -1)
    table = at[member.indices].flatten(1).long()
    unique = [torch.unique(row) for row in table]
    if len({len(row) for row in unique}) > 1:
        return None
    found = torch.stack(unique)
    return found if torch.unique(found).numel() == found.numel() else None  # shared columns tell no units apart


def _by_unit(
    said: Scored, member: Member, layer: Layer, columns: Tensor | None
) -> tuple[Float[Tensor, "row unit"], int]:
    """Sums over each unit's numbers, a row for each row of evidence, and how many numbers a unit has."""
    if columns is not None:
        values = said.values.movedim(0, 1).flatten(1)  # (row, part * in)
        return values[:, columns.to(values.device)].sum(-1, dtype=torch.float64), columns.shape[1]
    placed = layer.layout.from_matrices(said.values).movedim(member.dim, 0)
    lines = placed.reshape(placed.shape[0], -1).sum(1, dtype=torch.float64)
    cells = placed.numel() // placed.shape[0]
    indices = member.indices.to(lines.device)
    return lines[indices].sum(1)[None], cells * indices.shape[1]


def _nothing_to_look_at(units: Units, look: Look, over: str) -> str:
    if look.about == "scales":
        what = "weights of a batch norm, and none lies on this axis"
    elif look.about == "inputs":
        what = "the inputs of layers, and no layer reads these units as its inputs"
    else:
        which = "" if over == "all" else f" of its {over}"
        what = f"weights{which}{' with input activations' if look.needs_inputs else ''}, and it has none"
    return (
        f"{units.name}: the score looks at {what}. Choose a score of weights, such as magnitude or taylor, or another "
        "pattern"
    )
