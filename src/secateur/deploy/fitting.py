"""Where one integer has to hold two widths: the smaller is rounded up with zeroed units until they are one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from secateur.core.axes.atoms import Atom
from secateur.core.axes.layout import Extent
from secateur.core.units import Units
from secateur.deploy.attributes import Conflict, Survey
from secateur.deploy.parts import Counts, complete
from secateur.deploy.slots import Slot
from secateur.deploy.widths import AXES

__all__ = ["NotExactError", "fit"]


class NotExactError(Exception):
    """An axis cannot be rounded up with zeros, because a norm or mean runs over it."""

    def __init__(self, units: Units, words: str) -> None:
        super().__init__(words)
        self.units = units


def fit(
    observed: Survey, counts: Counts, units: Mapping[Atom, Units], *, may_pad: bool
) -> tuple[dict[Atom, Tensor], dict[Slot, list[int]], dict[Atom, str]]:
    """Widths that the model's integers can hold, at least those asked for.

    Args:
        observed: The integers and their uses.
        counts: Units to keep.
        units: Every axis by its atom.
        may_pad: Whether widths may be rounded up.

    Returns:
        Units that the tensors hold, the possible values of every integer in use, and why axes were rounded up.

    Raises:
        NotExactError: a width cannot be held and its axis cannot be rounded up.
    """
    held = dict(counts)
    why: dict[Atom, str] = {}
    while True:
        found = observed.domains(held)
        if not isinstance(found, Conflict):
            return held, found, why
        raised = _raised(observed, found, held)
        if not raised:  # calls that were matched with the wrong operators
            observed.ignored.add(found.slot)
            continue
        words = _words(observed, found, held, units)
        for leaf in raised:
            if not may_pad or not units[leaf].exact:
                raise NotExactError(units[leaf], words)
            why.setdefault(leaf, words)
        held |= {leaf: index for leaf, index in raised.items() if len(index) < leaf.size}
        for leaf, index in raised.items():
            if len(index) == leaf.size:
                del held[leaf]


def _leaves(extent: Extent, held: Counts) -> list[Atom]:
    found = (leaf for label in extent.labels for leaf in AXES.leaves(label))
    return [leaf for leaf in dict.fromkeys(found) if leaf in held]


def _raised(observed: Survey, conflict: Conflict, held: Mapping[Atom, Tensor]) -> dict[Atom, Tensor]:
    """One axis with more units, so that a width reaches the largest of the conflict, or is whole again."""
    widths = observed.widths
    new = {e: widths.new(e, held) for e in conflict.extents}
    top = max(new.values())
    low = [e for e in conflict.extents if new[e] < top and _leaves(e, held)]
    if not conflict.fixed:
        for extent in sorted(low, key=new.__getitem__):
            for leaf in _leaves(extent, held):
                for count in range(len(held[leaf]) + 1, leaf.size + 1):
                    more = complete(leaf.size, held[leaf], count)
                    if widths.new(extent, {**held, leaf: more}) == top:
                        return {leaf: more}
    stuck = low or [e for e in conflict.extents if _leaves(e, held)]
    leaves = {leaf for extent in stuck for leaf in _leaves(extent, held)}
    return {leaf: complete(leaf.size, held[leaf], leaf.size) for leaf in leaves}


def _words(observed: Survey, conflict: Conflict, held: Counts, units: Mapping[Atom, Units]) -> str:
    told = []
    for extent in conflict.extents:
        names = [units[leaf].name for leaf in _leaves(extent, held) if leaf in units]
        if names:
            told.append(f"{observed.widths.new(extent, held)} for {' and '.join(names)}")
    also = ", and it also sets a scale" if conflict.fixed else ""
    wanted = " as well as ".join(dict.fromkeys(told))
    return f"{conflict.slot} = {observed.old[conflict.slot]} would have to be {wanted}{also}"
