"""Exact choice of the smallest scores: over many tensors, within rows, without sorting or concatenating them.

Ties are broken by position: of equal scores the one with the lower index goes first, the order of a
stable ascending sort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.core import halves, native
from secateur.core.cut import CHUNK, Cut, Keys, Magnitudes, array_of, cut_by_part, kth_smallest, tensor_of

__all__ = [
    "Candidates",
    "Cut",
    "Guess",
    "Magnitudes",
    "all_but_smallest",
    "apportion",
    "cut_by_part",
    "kth_smallest",
    "last_of_all",
    "smallest",
]
# Elements whose passes stay in the cache of one core.
CACHED = 1 << 17
MINUS_INFINITY = -(1 << 23)  # its bits as a float32


@dataclass
class Guess:
    """The score at which a cut was found: the first guess of `smallest`, which then needs one pass instead of two."""

    value: float | None = None


@dataclass(frozen=True)
class Candidates:
    """The units of one layer that may be pruned, and what they are worth.

    Attributes:
        shape: `(competition, unit)`; units of one row compete with each other.
        cells: weights that one unit holds.
        scores: computes the `(competition, unit)` scores, float32, higher = keep. It is called anew in
            every pass, so that the scores of a whole model never exist at the same time.
        least: units that stay in every competition.
        step: counts are multiples of it, or all units.
        alike: those that say the same keep equally many units; "" says nothing.
        cost: computes what one unit needs of whatever is to become less, such as multiply-accumulates; None is its
            weights.
        magnitudes: the weights whose magnitudes are the scores, where scores are nothing else; only a saving.
        guess: of where these units are cut, once an allocator knows; only a saving.
    """

    shape: tuple[int, int]
    cells: int
    scores: Callable[[], Float[Tensor, "competition unit"]]
    least: int = 0
    step: int = 1
    alike: str = ""
    cost: Callable[[], float] | None = None
    magnitudes: Callable[[], Float[Tensor, "competition unit"]] | None = None
    guess: Guess = field(default_factory=Guess, compare=False)

    def keys(self) -> Keys:
        """What `cut_by_part` and `smallest` choose from: the scores, computed only where they have to be."""
        if self.magnitudes is not None:
            weights = self.magnitudes()
            if native.serves(weights) or halves.serves(weights):
                return Magnitudes(weights)
        return self.scores()

    @property
    def units(self) -> int:
        """Number of units in all competitions."""
        return self.shape[0] * self.shape[1]

    @property
    def weights(self) -> int:
        """Number of weights in all units."""
        return self.units * self.cells


def apportion(sizes: Sequence[int], total: int) -> list[int]:
    """Split `total` in proportion to `sizes`, exactly: shares sum to `total` and none exceeds its size.

    The method is Webster's (Sainte-Lague): unit j of part i stands at `(j + 1/2) / sizes[i]`, and the
    `total` first units in that order are taken, ties by index. A larger total never takes a share away, so
    masks of growing sparsity can be nested; rounding every part for itself, or largest remainders, cannot
    promise that.

    Example:
        >>> apportion([10, 10, 10], 14)
        [5, 5, 4]
    """
    whole = sum(sizes)
    if not 0 <= total <= whole:
        raise ValueError(f"cannot split {total} over {whole}")
    if whole == 0:
        return [0 for _ in sizes]
    # units that stand before total / whole; then units are added or taken back one by one, in order
    shares = [min(size, (2 * size * total + whole) // (2 * whole)) for size in sizes]
    while sum(shares) < total:
        open_ = [i for i, size in enumerate(sizes) if shares[i] < size]
        shares[min(open_, key=lambda i: (Fraction(2 * shares[i] + 1, sizes[i]), i))] += 1
    while sum(shares) > total:
        held = [i for i in range(len(sizes)) if shares[i]]
        shares[max(held, key=lambda i: (Fraction(2 * shares[i] - 1, sizes[i]), i))] -= 1
    return shares


def last_of_all(scores: Float[Tensor, "*shape"], kept: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The scores, `-inf` where not kept: what is pruned goes before everything else.

    Example:
        >>> last_of_all(torch.tensor([2.0, 1.0]), torch.tensor([False, True]))
        tensor([-inf, 1.])
    """
    found = torch.empty_like(scores, memory_format=torch.contiguous_format)
    pieces = zip(*(t.reshape(-1).split(CACHED) for t in (scores, kept, found)), strict=True)
    for given, mask, into in pieces:  # five times faster than masked_fill: no branches, and in the cache
        torch.add(given, mask.int().sub_(1).bitwise_and_(MINUS_INFINITY).view(torch.float32), out=into)
    return found


def all_but_smallest(
    keys: Keys, counts: Int[Tensor, " row"], *, guess: float | None = None
) -> Bool[Tensor, "row unit"]:
    """All that `smallest` does not mark: what stays; a pass less where the kernels serve."""
    if native.serves(tensor_of(keys)):
        absolute = isinstance(keys, Magnitudes)
        return native.smallest(tensor_of(keys), counts, absolute=absolute, guess=guess, others=True)
    return smallest(keys, counts, guess=guess).logical_not_()


def smallest(
    keys: Keys, counts: Int[Tensor, " row"], *, guess: float | None = None
) -> Bool[Tensor, "row unit"]:
    """Mark the `counts[r]` smallest scores of every row r, exactly, ties by index.

    Args:
        keys: scores `(row, unit)`, float32, no NaN; infinities are allowed. Or weights with these magnitudes.
        counts: how many to mark in each row, 0 to the row's length.
        guess: what may be the largest score marked in long rows; a wrong one costs a pass and changes nothing.

    Cost: linear in the number of scores; a copy of at most 2 million scores at a time.

    Example:
        >>> smallest(torch.tensor([[2.0, 1.0, 1.0, 1.0]]), torch.tensor([2]))
        tensor([[False,  True,  True, False]])
    """
    if native.serves(tensor_of(keys)):
        absolute = isinstance(keys, Magnitudes)
        return native.smallest(tensor_of(keys), counts, absolute=absolute, guess=guess)
    if isinstance(keys, Magnitudes) and halves.serves(keys.weights) and keys.weights.shape[0] == 1:
        return halves.smallest_in_row(keys.weights[0], int(counts[0]))[None]
    scores = keys.scores() if isinstance(keys, Magnitudes) else keys
    if isinstance(keys, Magnitudes) and native.serves(scores):
        return native.smallest(scores, counts)
    rows, units = scores.shape
    if rows == 1:
        return _smallest_in_row(scores[0], int(counts[0]))[None]
    if units > CHUNK:
        return torch.stack([_smallest_in_row(scores[r], int(counts[r])) for r in range(rows)])
    if units <= 8:
        return _smallest_in_groups(scores, counts)
    marked = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    step = max(1, CHUNK // units)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        marked[piece] = _smallest_in_rows(scores[piece], counts[piece].to(scores.device))
    return marked


def _smallest_in_row(scores: Float[Tensor, " unit"], count: int) -> Bool[Tensor, " unit"]:
    """One long row: its cut, then as many ties as are missing, chunk by chunk."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = kth_smallest([lambda: scores], count)
    marked = torch.as_tensor(array_of(scores) < cut.value)
    missing = count - cut.below
    for start in range(0, scores.numel(), CHUNK):
        if not missing:
            break
        ties = (scores[start : start + CHUNK] == cut.value).nonzero()[:missing, 0]
        marked[ties + start] = True
        missing -= ties.numel()
    return marked


def _smallest_in_groups(scores: Tensor, counts: Tensor) -> Tensor:
    """Short rows (the groups of N:M): each score's rank by comparing it with every other."""
    columns = [scores[:, j].contiguous() for j in range(scores.shape[1])]
    counts = counts.to(scores.device)
    marked = []
    for i, own in enumerate(columns):
        rank = torch.zeros_like(counts, dtype=torch.int8)
        for j, other in enumerate(columns):
            if j != i:
                rank += (other <= own) if j < i else (other < own)
        marked.append(rank < counts)
    return torch.stack(marked, dim=1)


def _smallest_in_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Rows of moderate length: each row's cut, then its ties by index."""
    value = _cut_of_rows(scores, counts)[:, None]
    marked = scores < value
    missing = counts - marked.sum(1)
    ties = scores == value
    if bool((ties.sum(1) == missing).all()):
        return marked | (ties & (counts > 0)[:, None])
    where = ties.nonzero()  # row-major, so ties of a row come in index order
    first = torch.searchsorted(where[:, 0].contiguous(), torch.arange(scores.shape[0], device=scores.device))
    rank = torch.arange(where.shape[0], device=scores.device) - first[where[:, 0]]
    taken = where[rank < missing[where[:, 0]]]
    marked[taken[:, 0], taken[:, 1]] = True
    return marked


def _cut_of_rows(scores: Tensor, counts: Tensor) -> Float[Tensor, " row"]:
    """The `counts[r]`-th smallest of each row; `-inf` where nothing is to be marked."""
    ranks = torch.unique(counts[counts > 0]).tolist()
    index = (counts.clamp(min=1) - 1)[:, None]
    if scores.device.type == "cpu" and len(ranks) <= 4:
        part = np.partition(scores.numpy(), [rank - 1 for rank in ranks] or 0, axis=1)
        value = torch.from_numpy(part).gather(1, index)[:, 0]
    else:
        value = scores.sort(dim=1).values.gather(1, index)[:, 0]
    return torch.where(counts > 0, value, -float("inf"))
