"""Counts of a tensor's values in fine bins, with the exact zeros apart: what a report keeps of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, UsageError
from .grid import LEAST, MOST, Grid, add
from .packing import pack_counts, unpack_counts

__all__ = ["CountBelow", "Histogram", "Moments", "is_bins"]


class CountBelow(NamedTuple):
    """How many values lie below a threshold: at least `low`, at most `high`, probably near `estimate`."""

    low: int
    estimate: int
    high: int

    @property
    def error(self) -> int:
        """The most by which any of the three can be wrong; 0 when the count is exact."""
        return self.high - self.low


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of a set of values; sets join without loss of digits.

    Source: Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
    variances", equation 2.1.
    """

    n: int
    mean: float
    squares: float

    @property
    def std(self) -> float:
        """Root of the mean squared deviation (divided by n); 0 of no values."""
        return math.sqrt(self.squares / self.n) if self.n else 0.0

    def join(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        n = self.n + other.n
        if n == 0:
            return self
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.n / n)
        return Moments(n, mean, self.squares + other.squares + gap * gap * (self.n * (other.n / n)))


@dataclass(frozen=True)
class Histogram:
    """How many values of a tensor lie in each bin, with the exact zeros counted apart.

    The bins are those of a small floating-point format. For each sign, the magnitudes below 2^exponent are
    cut into `bins` equal pieces, and every octave above it, [2^e, 2^(e+1)), again into `bins` equal pieces.
    All edges are binary fractions on one fixed grid, hence three things: a value is sorted into its bin
    without rounding; any two histograms merge exactly; and a plot with equal bins of a power-of-two width, not
    finer than the bins at its ends, has exact counts. A bin at magnitude m is at most m / `bins` wide, so the
    count below a threshold is as precise for a layer of tiny weights as for one with outliers.

    Attributes:
        bins: bins in each octave, a power of two.
        exponent: magnitudes below 2^exponent share bins of one width.
        negative: counts of the values below 0 by ascending magnitude, without trailing empty bins; bin 0 holds
            the magnitudes from 0 (excluded: zeros are apart) to 2^exponent / bins.
        positive: the same of the values above 0.
        zeros: values equal to 0, of either sign.
        min: the smallest value, as all that follow in the tensor's unit and 0 where there is no value.
        max: the largest value.
        mean: of all values, zeros included.
        std: root of the mean squared deviation (divided by n), zeros included.
    """

    bins: int
    exponent: int
    negative: tuple[int, ...]
    positive: tuple[int, ...]
    zeros: int
    min: float
    max: float
    mean: float
    std: float

    @property
    def n(self) -> int:
        """How many values were counted."""
        return sum(self.negative) + sum(self.positive) + self.zeros

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """Counts of both signs together, by ascending magnitude, zeros not included."""
        return add(self.negative, self.positive)

    @property
    def grid(self) -> Grid:
        """Where the bins lie: bin i holds the magnitudes from `grid.edge(i)` to below `grid.edge(i + 1)`."""
        return Grid(self.bins, self.exponent)

    @property
    def limit(self) -> float:
        """Upper edge of the last bin that holds a value; 0 where all values are 0."""
        return self.grid.edge(max(len(self.negative), len(self.positive)))

    def count_below(self, tau: float) -> CountBelow:
        """How many values have a magnitude strictly below `tau`, exact zeros included.

        Exact where `tau` is an edge of the bins, or above every magnitude. Elsewhere the values in the one bin
        around `tau` are undecided: `low` counts none of them, `high` all, and `estimate` takes them as evenly
        spread. That bin is at most tau / bins wide (2^exponent / bins where tau is below 2^exponent).

        Raises:
            UsageError: `tau` is negative, NaN or infinite.

        Example:
            >>> import torch
            >>> from secateur.report import histogram
            >>> histogram(torch.tensor([0.0, -0.25, 0.26, 0.75])).count_below(0.5)
            CountBelow(low=3, estimate=3, high=3)
        """
        if not (math.isfinite(tau) and tau >= 0):
            raise UsageError(f"tau is {tau}, expected a magnitude: a finite number of at least 0.")
        if tau == 0:
            return CountBelow(0, 0, 0)
        if tau > max(-self.min, self.max):
            return CountBelow(self.n, self.n, self.n)
        counts = self.magnitudes
        index = int(self.grid.index(np.array([float(tau)]))[0])
        start, end = self.grid.edge(index), self.grid.edge(index + 1)
        low = self.zeros + sum(counts[:index])
        inside = counts[index] if start < tau else 0
        return CountBelow(low, low + round((tau - start) / (end - start) * inside), low + inside)

    def count_up_to(self, tau: float) -> CountBelow:
        """How many values have a magnitude of at most `tau`, exact zeros included: what a threshold removes.

        Compared in single precision, as `secateur.allocate.Threshold` compares, so of values in single precision or
        narrower this is exact wherever the next number after `tau` is an edge of the bins.

        Raises:
            UsageError: `tau` is negative, NaN or infinite.

        Example:
            >>> import torch
            >>> from secateur.report import histogram
            >>> histogram(torch.tensor([0.0, -0.25, 0.5, 0.75])).count_up_to(0.49999997)
            CountBelow(low=2, estimate=2, high=2)
        """
        if not (math.isfinite(tau) and tau >= 0):
            raise UsageError(f"tau is {tau}, expected a magnitude: a finite number of at least 0.")
        if tau == 0:
            return CountBelow(self.zeros, self.zeros, self.zeros)
        if tau >= 2.0**127:
            return CountBelow(self.n, self.n, self.n) if tau >= self.limit else self.count_below(tau)
        return self.count_below(float(np.nextafter(np.float32(tau), np.float32(np.inf))))

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values together: bins and counts as of one tensor that holds both.

        Where the two have different bins, the result has the coarser. mean and std agree with those of the
        joint tensor up to rounding.
        """
        bins, exponent = min(self.bins, other.bins), max(self.exponent, other.exponent)
        if self.n == 0 or other.n == 0:
            return (other if self.n == 0 else self)._on(Grid(bins, exponent))
        one, two = self._on(Grid(bins, exponent)), other._on(Grid(bins, exponent))
        both = Moments(one.n, one.mean, one.std**2 * one.n).join(Moments(two.n, two.mean, two.std**2 * two.n))
        return Histogram(
            bins,
            exponent,
            negative=add(one.negative, two.negative),
            positive=add(one.positive, two.positive),
            zeros=one.zeros + two.zeros,
            min=min(one.min, two.min),
            max=max(one.max, two.max),
            mean=both.mean,
            std=both.std,
        )

    def _on(self, grid: Grid) -> Histogram:
        """The same values in coarser bins; exact, as every finer bin lies inside a coarser one."""
        if grid == self.grid:
            return self
        lower = np.array(
            [self.grid.edge(index) for index in range(max(len(self.negative), len(self.positive)))]
        )
        negative, positive = (
            grid.fold(lower[: len(side)], np.array(side, dtype=np.int64))
            for side in (self.negative, self.positive)
        )
        return Histogram(
            grid.bins, grid.exponent, negative, positive, self.zeros, self.min, self.max, self.mean, self.std
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, 1 to 2 kilobytes for a layer of a language model."""
        return {
            "bins": self.bins,
            "exponent": self.exponent,
            "negative": pack_counts(self.negative),
            "positive": pack_counts(self.positive),
            "zeros": self.zeros,
            "n": self.n,
            "min": self.min,
            "max": self.max,
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Histogram:
        """The histogram that `to_dict` described, bit for bit.

        Raises:
            InputError: a field is missing or impossible, or the counts do not add up to n.
        """
        bins, exponent, zeros, n = (_whole(stored, field) for field in ("bins", "exponent", "zeros", "n"))
        low, high, mean, std = (_real(stored, field) for field in ("min", "max", "mean", "std"))
        if not is_bins(bins) or not LEAST - 64 <= exponent <= MOST:
            raise InputError(
                f"stored histogram: bins {bins} and exponent {exponent} are no grid of this format. "
                f"Write the file again."
            )
        negative, positive = (
            tuple(unpack_counts(stored.get(side), most=65 * bins)) for side in ("negative", "positive")
        )
        result = cls(bins, exponent, negative, positive, zeros, low, high, mean, std)
        if result.n != n or zeros < 0:
            raise InputError(
                f"stored histogram: its counts make {result.n} values of which {zeros} are zeros, "
                f"expected n = {n}. Write the file again."
            )
        return result


def is_bins(bins: object) -> bool:
    """Whether this can be a number of bins in an octave: a power of two from 1 to 256."""
    return type(bins) is int and 1 <= bins <= 256 and bins & (bins - 1) == 0


def _whole(stored: Mapping[str, Any], field: str) -> int:
    value = stored.get(field)
    if type(value) is not int:
        raise InputError(f"stored histogram: {field} is {value!r}, expected an integer. Write the file again.")
    return value


def _real(stored: Mapping[str, Any], field: str) -> float:
    value = stored.get(field)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(
            f"stored histogram: {field} is {value!r}, expected a finite number. Write the file again."
        )
    return float(value)
