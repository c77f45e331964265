"""The shapes that are cut. A pattern pools scores into units and spreads the kept units back over weights.

A unit's score is the mean over its weights, so units of different sizes compare fairly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.errors import UsageError

__all__ = ["NM", "Blocks", "Columns", "Rows", "Weights"]


@dataclass(frozen=True)
class Weights:
    """Single weights; the weights of one output row compete with each other."""

    def pool(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, "competition unit"]:
        """Every weight is a unit."""
        return scores

    def spread(self, kept: Bool[Tensor, "competition unit"], shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """Units are weights."""
        return kept


@dataclass(frozen=True)
class NM:
    """`n` weights *kept* of every `m` consecutive inputs of a row, as sparse tensor cores want it (2:4).

    The pattern fixes the sparsity, `1 - n / m`.

    Example:
        >>> NM(2, 4).sparsity
        0.5
    """

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise UsageError(f"{self.n}:{self.m} keeps {self.n} of every {self.m}; expected 0 < n <= m")

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that this pattern fixes."""
        return 1 - self.n / self.m

    def pool(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, "competition unit"]:
        """Every group of m consecutive inputs is a competition."""
        _check_divides(scores.shape[1], self.m, "input columns", f"{self.n}:{self.m}")
        return scores.reshape(-1, self.m)

    def spread(self, kept: Bool[Tensor, "competition unit"], shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """Groups lie side by side in a row."""
        return kept.reshape(shape)

    def allocate(self, layers: Any, keep: int) -> dict[str, Int[Tensor, " competition"]]:
        """n of every m, whatever was asked."""
        return {name: torch.full((layer.shape[0],), self.n) for name, layer in layers.items()}


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` outputs by `columns` inputs, kept or cut as wholes.

    Blocks of 4 x 1 (four outputs that share an input) are what a CPU runs fastest; 16 x 16 suits GPUs.
    """

    rows: int
    columns: int

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1:
            raise UsageError(
                f"a block of {self.rows} x {self.columns} holds no weight; expected at least 1 x 1"
            )

    def pool(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, "competition unit"]:
        """The mean of every block; the blocks of one block row compete."""
        out, columns = scores.shape
        _check_divides(out, self.rows, "output rows", f"blocks of {self.rows} x {self.columns}")
        _check_divides(columns, self.columns, "input columns", f"blocks of {self.rows} x {self.columns}")
        tiles = scores.reshape(out // self.rows, self.rows, columns // self.columns, self.columns)
        return tiles.mean((1, 3))

    def spread(self, kept: Bool[Tensor, "competition unit"], shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """A block's fate is the fate of all its weights."""
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


@dataclass(frozen=True)
class Rows:
    """Whole output rows (neurons, filters); all rows of a layer compete, so per row means per layer here."""

    def pool(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, "competition unit"]:
        """One competition of all rows."""
        return scores.mean(1)[None]

    def spread(self, kept: Bool[Tensor, "competition unit"], shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """A row's fate is the fate of all its weights."""
        return kept[0][:, None].expand(shape)


@dataclass(frozen=True)
class Columns:
    """Whole input columns: everything that reads one input; all columns of a layer compete."""

    def pool(self, scores: Float[Tensor, "out in"]) -> Float[Tensor, "competition unit"]:
        """One competition of all columns."""
        return scores.mean(0)[None]

    def spread(self, kept: Bool[Tensor, "competition unit"], shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
        """A column's fate is the fate of all its weights."""
        return kept[0][None, :].expand(shape)


def _check_divides(size: int, step: int, what: str, pattern: str) -> None:
    if size % step:
        raise UsageError(f"{size} {what} cannot be cut {pattern} ({size} % {step} = {size % step})")
