"""What shrinking did to a model, kept beside its tensors and outside of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from secateur.core.example import Example
from secateur.deploy.slots import ATTRIBUTE, Slot
from secateur.errors import UsageError

__all__ = ["Axis", "Shrunk", "after", "shrunk"]


@dataclass(frozen=True)
class Axis:
    """One axis of a shrunk model.

    Attributes:
        name, kind: As in the analysis.
        size: Units before.
        kept: Units left by the masks.
        width: Units that the tensors hold: more than `kept` where the modules' integers could not follow; the
            surplus is zero.
        exact: Whether removing equals masking; where not, norms are over the survivors.
        reason: Why it is not exact, or why the width is larger.
    """

    name: str
    kind: str
    size: int
    kept: int
    width: int
    exact: bool
    reason: str = ""


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` did and how it was checked.

    Attributes:
        axes: Axes that lost units.
        index: Tensor name -> kept positions of each dimension, None where all stay; under all names.
        zeros: For tensors that hold surplus units the positions that are not zeroed, before slicing.
        numbers: Integers that follow -> (old, new).
        difference: Largest relative difference to the masked model over all inputs tried.
        checked: The inputs tried, in words.
        parameters: Number of parameters before and after; tied ones once.
        like: Name of the model's class.
        config: What a transformers model's configuration said before, as plain JSON; None for other models.
        example: Inputs of at most two rows on which it can be run; None where it was loaded from a file.
    """

    axes: tuple[Axis, ...]
    index: Mapping[str, tuple[Tensor | None, ...]]
    zeros: Mapping[str, tuple[Tensor | None, ...]]
    numbers: Mapping[Slot, tuple[int, int]]
    difference: float
    checked: tuple[str, ...]
    parameters: tuple[int, int]
    like: str
    config: Mapping[str, Any] | None = None
    example: Example | None = None

    @property
    def exact(self) -> bool:
        """Whether the model computes what the masked one does, not only up to norms over the survivors."""
        return all(axis.exact for axis in self.axes)

    @property
    def padded(self) -> tuple[Axis, ...]:
        """Axes whose tensors hold zeroed units, because the modules' integers could not follow."""
        return tuple(axis for axis in self.axes if axis.width > axis.kept)

    @property
    def equality(self) -> str:
        """How well it agrees with the masked model, in words."""
        if not self.difference:
            return "equal to the masked model bit for bit"
        return f"equal to the masked model within {self.difference:.0e} of its largest output"

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{self.like}: {before:,} parameters, {after:,} left ({1 - after / max(1, before):.1%} removed)"
        ]
        for axis in self.axes:
            held = f", held as {axis.width}" if axis.width > axis.kept else ""
            note = "" if axis.exact else " (approximate)"
            why = f": {axis.reason}" if axis.reason else ""
            lines.append(f"{axis.name}: {axis.kept} of {axis.size}{held}{note}{why}")
        lines.append(
            f"equal to the masked model within {self.difference:.1e} on {', '.join(self.checked) or 'nothing'}"
        )
        return "\n".join(lines)


def after(first: Shrunk, second: Shrunk) -> Shrunk:
    """Two shrinkings one after the other as one, of the first's model."""
    index: dict[str, tuple[Tensor | None, ...]] = {}
    for name in dict.fromkeys([*first.index, *second.index]):
        one, two = first.index.get(name), second.index.get(name)
        pairs = zip(one or (None,) * len(two or ()), two or (None,) * len(one or ()), strict=True)
        index[name] = tuple(b if a is None else a if b is None else a[b] for a, b in pairs)
    numbers = {**second.numbers, **first.numbers}
    for slot, (_, new) in second.numbers.items():
        numbers[slot] = (numbers[slot][0], new)
    return replace(
        second,
        axes=first.axes + second.axes,
        index=index,
        numbers=numbers,
        difference=max(first.difference, second.difference),
        parameters=(first.parameters[0], second.parameters[1]),
        config=first.config,
    )


def shrunk(model: nn.Module) -> Shrunk:
    """What `shrink` noted on a model it made.

    Raises:
        UsageError: it did not make this one.
    """
    found: Any = vars(model).get(ATTRIBUTE)
    if not isinstance(found, Shrunk):
        raise UsageError(f"{type(model).__name__}: not made by shrink; nothing is known of its kept units.")
    return found
