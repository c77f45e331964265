"""Allocators that say by name or by depth which layers pay more; totals stay exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from secateur.allocate.share import Counts
from secateur.core.select import Candidates
from secateur.errors import UsageError, nearest

__all__ = ["Shares", "Slope", "block_of", "share_out"]


@dataclass(frozen=True)
class Shares:
    """An explicit sparsity for each layer, scaled together to the exact total.

    Densities (1 - sparsity) are multiplied by one common factor, and what would exceed 1 is spread over the
    other layers, until all layers together keep what was asked. Where the given sparsities already average
    to the target, they are met as given, within one unit a layer.

    Args:
        sparsities: parameter names, or globs over them, and the sparsity of each, in [0, 1]; a mapping or a
            sequence of pairs. An exact name wins over a glob, an earlier glob over a later one.
        rows: whether the rows of a layer compete each for itself (Wanda), or the layer as a whole.

    Raises:
        UsageError: a sparsity outside [0, 1]; when called, a layer without a share, a glob without a layer.

    Example:
        >>> layer = Candidates((4, 8), 1, lambda: torch.rand(4, 8))
        >>> Shares({"a": 0.75, "*": 0.25})({"a": layer, "b": layer}, 32)
        {'a': tensor([8]), 'b': tensor([24])}
    """

    sparsities: Mapping[str, float] | Sequence[tuple[str, float]]
    rows: bool = False

    def __post_init__(self):
        given = self.sparsities.items() if isinstance(self.sparsities, Mapping) else self.sparsities
        pairs = tuple((str(name), float(sparsity)) for name, sparsity in given)
        object.__setattr__(self, "sparsities", pairs)  # so that equal shares are equal, and hashable
        if not pairs:
            raise UsageError("shares are empty; give each layer, or '*', a sparsity")
        for name, sparsity in pairs:
            if not 0 <= sparsity <= 1:
                raise UsageError(f"share of {name!r}: sparsity {sparsity:g} is not in [0, 1]")

    def of(self, name: str) -> float:
        """The sparsity given for a layer, before scaling."""
        pairs: Sequence[tuple[str, float]] = self.sparsities  # type: ignore[assignment]
        for exact in (True, False):
            for pattern, sparsity in pairs:
                if pattern == name if exact else fnmatchcase(name, pattern):
                    return sparsity
        raise UsageError(f"{name}: no share is given for it; add one, or a last pattern '*'")

    def __call__(self, layers: Mapping[str, Candidates], keep: int) -> Counts:
        """Kept units of each layer."""
        pairs: Sequence[tuple[str, float]] = self.sparsities  # type: ignore[assignment]
        for pattern, _ in pairs:
            if not any(fnmatchcase(name, pattern) or name == pattern for name in layers):
                raise UsageError(
                    f"the share for {pattern!r} matches none of the {len(layers)} layers; "
                    f"{nearest(pattern, layers)}"
                )
        densities = [1 - self.of(name) for name in layers]
        scaled = share_out(layers, lambda factor: [factor * density for density in densities], keep, self.rows)
        return scaled


@dataclass(frozen=True)
class Slope:
    """Sparsity that rises with depth: the last block is sparser than the first by `rise`, in equal steps.

    Early blocks are the ones whose errors all later ones inherit, so a small positive rise often helps; it must
    be judged on held-out data, see `secateur.search`.

    Args:
        rise: sparsity of the last block minus that of the first, in [-1, 1]; 0 is the same for all.
        rows: whether the rows of a layer compete each for itself.

    Source: ATP, arXiv 2502.14770 (an arithmetic progression in depth with one parameter). Deviations: the
        parameter is the whole rise, not the step; totals are exact for blocks of unequal sizes.

    Example:
        >>> layer = Candidates((4, 8), 1, lambda: torch.rand(4, 8))
        >>> Slope(0.5)({"h.0.weight": layer, "h.1.weight": layer}, 32)
        {'h.0.weight': tensor([24]), 'h.1.weight': tensor([8])}
    """

    rise: float
    rows: bool = False

    def __post_init__(self):
        if not -1 <= self.rise <= 1:
            raise UsageError(f"rise {self.rise:g} is not in [-1, 1]: last block's sparsity minus the first's")

    def __call__(self, layers: Mapping[str, Candidates], keep: int) -> Counts:
        """Kept units of each layer."""
        order = {block: place for place, block in enumerate(dict.fromkeys(map(block_of, layers)))}
        last = max(1, len(order) - 1)
        drop = [self.rise * order[block_of(name)] / last for name in layers]
        return share_out(layers, lambda level: [level - each for each in drop], keep, self.rows)


def block_of(name: str) -> str:
    """The block that a parameter stands in: its path up to the first number, or the path itself.

    Example:
        >>> block_of("model.layers.3.mlp.experts.0.up_proj.weight"), block_of("lm_head.weight")
        ('model.layers.3', 'lm_head')
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


def share_out(
    layers: Mapping[str, Candidates],
    densities: Callable[[float], Sequence[float]],
    keep: int,
    rows: bool = False,
) -> Counts:
    """Find the level at which the layers' densities, each cut off to [0, 1], keep `keep` weights in all.

    Every layer keeps the nearest whole number of units at that level; where several layers gain a unit at the
    very same level, the first ones in order do. A larger `keep` means a higher level, so it never takes a
    unit away, and a layer whose density stays at 0 at any level gives way to all others.

    Args:
        layers: the units of every layer.
        densities: the level -> the density of each layer, not falling in the level.
        keep: weights to keep in all layers together.
        rows: split a layer's count evenly over its rows, the first rows keeping one more.

    Returns:
        For each layer one count, or one count a row. The total is `keep` exactly where all units hold equally
        many weights, otherwise within half of the largest unit.
    """
    units = [layer.units for layer in layers.values()]
    cells = [layer.cells for layer in layers.values()]

    def counts_at(level: float) -> list[int]:
        return [
            min(n, max(0, math.floor(n * density + 0.5)))
            for n, density in zip(units, densities(level), strict=True)
        ]

    counts = _fill(counts_at, units, cells, keep)
    found = {}
    for (name, layer), count in zip(layers.items(), counts, strict=True):
        own = layer.shape[0] if rows else 1
        found[name] = torch.full((own,), count // own)
        found[name][: count % own] += 1
    return found


def _fill(
    counts_at: Callable[[float], list[int]], units: Sequence[int], cells: Sequence[int], keep: int
) -> list[int]:
    """Bisect for the level, then add one by one the units that all stand at it."""

    def total(counts: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(counts, cells, strict=True))

    low, high = -4.0, 4.0
    # the range must not depend on `keep`: then all targets halve the same intervals, and shares only grow
    while high < 1e18 and any(0 < count < n for count, n in zip(counts_at(high), units, strict=True)):
        high *= 8
    lower, upper = counts_at(low), counts_at(high)
    if total(upper) < keep:  # the rest can only come from layers of density 0
        lower, upper = upper, list(units)
    else:
        for _ in range(100):
            middle = (low + high) / 2
            at = counts_at(middle)
            if total(at) <= keep:
                low, lower = middle, at
            else:
                high, upper = middle, at
            if lower == upper or not low < (low + high) / 2 < high:
                break
    return _step(lower, upper, cells, keep)


def _step(lower: Sequence[int], upper: Sequence[int], cells: Sequence[int], keep: int) -> list[int]:
    """From `lower` towards `upper`, layer after layer, to the total nearest to `keep`."""
    counts = list(lower)
    missing = keep - sum(count * size for count, size in zip(counts, cells, strict=True))
    for place, size in enumerate(cells):
        added = min(upper[place] - counts[place], max(0, missing // size))
        counts[place] += added
        missing -= added * size
        if counts[place] < upper[place]:  # one unit more would exceed; take it if that comes nearer
            if 2 * missing > size:
                counts[place] += 1
            break
    return counts
