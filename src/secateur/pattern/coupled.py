"""Patterns of coupled units: heads, neurons, channels ..., each a set of slices of several tensors.

Which slices belong together is found by the axis analysis; a pattern says which kinds of axes are cut, and
how far. Patterns are joined by `|`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import nn

from secateur.core.units import Analysis, Units
from secateur.core.where import layers
from secateur.errors import UsageError, nearest
from secateur.pattern.axis import AxisSite, NothingToLookAtError

__all__ = [
    "Axes",
    "Channels",
    "Coupled",
    "Experts",
    "Heads",
    "Hidden",
    "KVGroups",
    "Neurons",
    "QueryHeads",
    "Together",
]

OVER = ("all", "readers", "writers")


@dataclass(frozen=True)
class Coupled:
    """What patterns of coupled units share; the kinds of axes are those of `core.units.Units.kind`.

    Args:
        minimum: units that stay on every axis, at least 1: no layer ever gets width zero.
        multiple: the width that an axis has in every tensor is a multiple of this, or stays whole.
        homogeneous: axes of one kind and size keep equally many units, so that every block has one shape.
        over: whose weights a score of weights looks at: of `all` members of a unit, of those that read it (`readers`,
            its columns in the next layer), or of those that compute it (`writers`).
    """

    minimum: int = 1
    multiple: int = 1
    homogeneous: bool = False
    over: str = "all"  # one of OVER
    kinds: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.minimum < 1:
            raise UsageError(f"minimum is {self.minimum}; at least 1 unit has to stay on every axis")
        if self.multiple < 1:
            raise UsageError(f"multiple is {self.multiple}; expected a width of at least 1, such as 8")
        if self.over not in OVER:
            raise UsageError(f"over is {self.over!r}; expected 'all', 'readers' or 'writers'")

    def __or__(self, other: Any) -> Together:
        """Both kinds of units."""
        return Together((self,)) | other

    def chooses(self, units: Units) -> bool:
        """Whether this pattern cuts that axis."""
        return units.kind in self.kinds

    def sites(
        self, model: nn.Module, analysis: Analysis, look: Any, barred: Collection[str] = ()
    ) -> tuple[tuple[AxisSite, ...], tuple[tuple[str, str], ...]]:
        """The axes that are cut, and those of the right kind that are not, each with the reason.

        Args:
            model: what was analysed.
            analysis: its axes.
            look: what the score looks at, see `core.site.Look`.
            barred: names of matrices that are to be left as they are.

        Raises:
            UsageError: the model has no such axis, or the score finds nothing to look at on one.
        """
        return Together((self,)).sites(model, analysis, look, barred)

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        plain = type(self)()
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name in ("minimum", "multiple", "homogeneous", "over")
            if getattr(self, name) != getattr(plain, name)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True, repr=False)
class Neurons(Coupled):
    """Inner units of feed-forward and recurrent layers."""

    kinds = ("feed-forward unit", "recurrent unit")


@dataclass(frozen=True, repr=False)
class Heads(Coupled):
    """Attention heads; where query heads share keys and values, such a key/value head with all its query heads."""

    kinds = ("head", "KV group")


@dataclass(frozen=True, repr=False)
class KVGroups(Coupled):
    """Key/value heads with all query heads that share them."""

    kinds = ("KV group",)


@dataclass(frozen=True, repr=False)
class QueryHeads(Coupled):
    """Places of a query head within its key/value group: one goes from every group of the layer."""

    kinds = ("query head",)


@dataclass(frozen=True, repr=False)
class Channels(Coupled):
    """Channels of convolutions."""

    kinds = ("channel",)


@dataclass(frozen=True, repr=False)
class Hidden(Coupled):
    """The width of the residual stream; exact only where no norm runs over it."""

    kinds = ("hidden",)


@dataclass(frozen=True, repr=False)
class Experts(Coupled):
    """Inner units of the experts' feed-forward layers; all experts of a layer lose the same ones."""

    kinds = ("expert feed-forward",)


@dataclass(frozen=True, repr=False)
class Axes(Coupled):
    """Axes by name: kinds, such as "v dimension", or globs over the names that `secateur inspect --axes` lists.

    Example:
        >>> Axes("v dimension", "heads of *.3.attn")
        Axes('v dimension', 'heads of *.3.attn')
    """

    names: tuple[str, ...] = ()

    def __init__(self, *names: str, minimum: int = 1, multiple: int = 1, homogeneous: bool = False,
                 over: str = "all"):  # fmt: skip
        for field, value in (("minimum", minimum), ("multiple", multiple), ("homogeneous", homogeneous),
                             ("over", over), ("names", names)):  # fmt: skip
            object.__setattr__(self, field, value)
        if not names:
            raise UsageError("Axes() names no axis; give kinds or globs over names, such as 'v dimension'")
        self.__post_init__()

    def chooses(self, units: Units) -> bool:
        """Whether a word is the kind, the name or a glob for it."""
        return any(word in (units.kind, units.name) or fnmatchcase(units.name, word) for word in self.names)

    def __repr__(self) -> str:
        rest = repr(Neurons(self.minimum, self.multiple, self.homogeneous, self.over))[len("Neurons(") : -1]
        return f"Axes({', '.join([*map(repr, self.names), *([rest] if rest else [])])})"


@dataclass(frozen=True)
class Together:
    """Several patterns of coupled units at once; of two that choose the same axis the first counts."""

    parts: tuple[Coupled, ...]

    def __or__(self, other: Any) -> Together:
        """One pattern more."""
        if isinstance(other, Together):
            return Together(self.parts + other.parts)
        if not isinstance(other, Coupled):
            raise UsageError(
                f"{other!r} cannot be joined with {self!r}; only patterns of whole units can, such as "
                "Heads() | Neurons(). Prune twice, with the masks of the first call"
            )
        return Together((*self.parts, other))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))

    def sites(
        self, model: nn.Module, analysis: Analysis, look: Any, barred: Collection[str] = ()
    ) -> tuple[tuple[AxisSite, ...], tuple[tuple[str, str], ...]]:
        """As `Coupled.sites`, for all parts."""
        known = {name: layer for layer in layers(model) for name in (layer.name, *layer.tied)}
        found: list[AxisSite] = []
        left_out: list[tuple[str, str]] = []
        for units in analysis.units:
            part = next((part for part in self.parts if part.chooses(units)), None)
            if part is None:
                continue
            through = [member.name for member in units.members if member.name in barred]
            if through:
                left_out.append((units.name, f"runs through {through[0]}, which only= or skip= leaves out"))
                continue
            try:
                found.append(_site(part, model, analysis, units, known, look))
            except NothingToLookAtError as error:
                if look.about != "scales":  # some channels have no norm behind them, others do
                    raise
                left_out.append((units.name, str(error)))
        for part in self.parts:
            if not any(part.chooses(units) for units in analysis.units):
                raise UsageError(_none_of(part, analysis))
        if not found:
            name, why = left_out[0]
            raise UsageError(why if why.startswith(name) else f"no axis is left to prune: {name} {why}")
        return tuple(found), tuple(left_out)


def _site(part: Coupled, model: nn.Module, analysis: Analysis, units: Units, known: Any, look: Any) -> AxisSite:
    widths = (member.indices.shape[1] for member in units.members if member.is_parameter)
    step = part.multiple // math.gcd(part.multiple, *widths)  # so that every tensor's width is a multiple
    alike = f"{units.kind} of {units.size}" if part.homogeneous else ""
    if part.minimum > units.size:
        raise UsageError(f"{units.name}: minimum={part.minimum} is more than its {units.size} units")
    return AxisSite.of(model, analysis, units, known, look, part.over, part.minimum, step, alike)


def _none_of(part: Coupled, analysis: Analysis) -> str:
    kinds = list(dict.fromkeys(units.kind for units in analysis.units))
    if isinstance(part, Axes):
        names = [*kinds, *(units.name for units in analysis.units)]
        return f"{part!r} matches none of the {len(analysis.units)} axes; {nearest(part.names[0], names)}"
    frozen = [f"{each.members[0][0]}: {each.reason}" for each in _relevant(analysis.frozen)]
    why = f"; frozen are {'; '.join(frozen[:3])}" if frozen else ""
    has = f"it has axes of kind {', '.join(kinds)}" if kinds else "it has no prunable axis"
    return f"{part!r}: the model has no axis of kind {' or '.join(part.kinds)}; {has}{why}"


def _relevant(frozen: Iterable[Any]) -> list[Any]:
    """Reasons that name an operator: those that a user may want to know."""
    return [each for each in frozen if each.reason.operator and each.members]
