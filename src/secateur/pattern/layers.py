"""Whole blocks as the shape that is cut."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Layers"]


@dataclass(frozen=True)
class Layers:
    """Whole blocks of a model; all blocks of its lists compete.

    Attributes:
        together: the blocks have to be neighbours, a run that is scored as one.
        again: choose one block at a time, and score what is left again after each.
    """

    together: bool = False
    again: bool = False

    def pool(self, scores: Float[Tensor, " block"]) -> Float[Tensor, "competition block"]:
        """One competition of all blocks."""
        return scores[None]

    def spread(
        self, kept: Bool[Tensor, "competition block"], shape: tuple[int, ...] = ()
    ) -> Bool[Tensor, " block"]:
        """Units are blocks."""
        return kept[0]
