"""Bins of a small floating-point format: edges that depend on no data, so that counts never round."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LEAST", "MOST", "Floats", "Grid", "Ints", "add"]

LEAST, MOST = -500, 500
"""Magnitudes are told apart between 2^-500 and 2^500: outside, their squares leave double precision."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Bins of magnitudes: 2^exponent cut into `bins` equal pieces, then each octave above it into `bins`.

    Every edge is a binary fraction, and the bins of a finer grid (more bins, lower exponent) lie inside those
    of a coarser one, so counts move to a coarser grid exactly.

    Example:
        >>> grid = Grid(bins=4, exponent=0)
        >>> [grid.edge(index) for index in range(10)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5]
    """

    bins: int
    exponent: int

    def edge(self, index: int) -> float:
        """Lower edge of the bin `index`, which is the upper edge of the bin before it."""
        octave, step = divmod(index, self.bins)
        if octave == 0:
            return math.ldexp(step / self.bins, self.exponent)
        return math.ldexp(1 + step / self.bins, self.exponent + octave - 1)

    def index(self, magnitudes: Floats) -> Ints:
        """The bin of each magnitude; every step scales by a power of two or truncates, so none rounds."""
        fraction, power = np.frexp(magnitudes)
        octave = np.where(magnitudes > 0, power.astype(np.int64) - 1 - self.exponent, -1)
        above = (1 + octave) * self.bins + ((2 * fraction - 1) * self.bins).astype(np.int64)
        below = (np.ldexp(np.where(octave < 0, magnitudes, 0), -self.exponent) * self.bins).astype(np.int64)
        return np.where(octave < 0, below, above)

    def fold(self, lower: Floats, counts: Ints) -> tuple[int, ...]:
        """Counts of finer bins, given by their lower edges, added up in the bins of this grid.

        Returns:
            Counts by ascending magnitude, without trailing empty bins.
        """
        if not counts.any():
            return ()
        index = self.index(lower)
        folded = np.zeros(int(index.max()) + 1, dtype=np.int64)
        np.add.at(folded, index, counts)
        return tuple(folded[: int(folded.nonzero()[0][-1]) + 1].tolist())


def add(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, ...]:
    """Bin by bin sum of two rows of counts on one grid, the shorter one going on with empty bins.

    Example:
        >>> add((1, 2, 3), (10,))
        (11, 2, 3)
    """
    longer, shorter = sorted((one, two), key=len, reverse=True)
    return tuple(a + b for a, b in zip(longer, shorter, strict=False)) + longer[len(shorter) :]
