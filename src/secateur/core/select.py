"""Exact choice of the smallest scores: over many tensors, within rows, without sorting or concatenating them.

Ties are broken by position: of equal scores the one with the lower index goes first, the order of a
stable ascending sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from secateur.core import halves, native

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

# Elements looked at in one go: large enough to hide Python, small enough to stay in the cache hierarchy
# and to keep the extra memory of a 100-million-weight model at a few megabytes.
CHUNK = 1 << 21
# A larger sample costs more to sort than its narrower bracket saves to rank.
SAMPLE = 1 << 17
# Of a sample within bounds; where fewer are found all elements are held against them.
ENOUGH = 1 << 12
# Elements whose passes stay in the cache of one core.
CACHED = 1 << 17
MINUS_INFINITY = -(1 << 23)  # its bits as a float32
# Irrational, so that samples do not fall in step with any layout.
STRIDE = 1 + 5**0.5


@dataclass(frozen=True)
class Magnitudes:
    """Scores that are the magnitudes of weights, not computed: who reads the weights themselves needs no copy."""

    weights: Float[Tensor, "competition unit"]

    def scores(self) -> Float[Tensor, "competition unit"]:
        """The scores."""
        return self.weights.abs().float()

    def reshape(self, *shape: int) -> Magnitudes:
        """In another shape."""
        return Magnitudes(self.weights.reshape(shape))


# what is chosen from
Keys = Tensor | Magnitudes


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
        cost: what one unit needs of whatever is to become less, such as multiply-accumulates; None is its weights.
        magnitudes: the weights whose magnitudes are the scores, where scores are nothing else; only a saving.
        guess: of where these units are cut, once an allocator knows; only a saving.
    """

    shape: tuple[int, int]
    cells: int
    scores: Callable[[], Float[Tensor, "competition unit"]]
    least: int = 0
    step: int = 1
    alike: str = ""
    cost: float | None = None
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


@dataclass(frozen=True)
class Cut:
    """Where the `k` smallest end: `below` elements are smaller than `value`; `k - below` equal it."""

    value: float
    below: int


def kth_smallest(parts: Sequence[Callable[[], Keys]], k: int) -> Cut:
    """The k-th smallest element (k from 1) of all tensors together, exactly.

    Args:
        parts: functions that return the tensors (float32, any shape, no NaN); each is called about twice.
        k: rank, 1 to the number of elements.

    Returns:
        The element and the number of elements strictly below it.

    Cost: about two passes over the data; extra memory a few megabytes beside one tensor at a time.

    Example:
        >>> parts = [lambda: torch.tensor([3.0, 1.0]), lambda: torch.tensor([1.0, 2.0])]
        >>> kth_smallest(parts, 3)
        Cut(value=2.0, below=2)
    """
    value, below, _ = cut_by_part(parts, k)
    return Cut(value, sum(below))


def cut_by_part(parts: Sequence[Callable[[], Keys]], k: int) -> tuple[float, list[int], list[int]]:
    """The k-th smallest element of all tensors together, and for each tensor how many lie below it and equal it.

    A sample brackets the answer, one pass counts what lies below the bracket and collects what lies inside
    it; the collected few are ranked. A bracket that misses, or that holds too many ties, is narrowed and
    tried again, so the answer is exact for any data. Magnitudes of 16 bits are counted instead, in one pass.
    """
    halved, parts = _halved(parts)
    if halved and (found := _cut_of_halves(parts, k)) is not None:
        return found
    low, high = -float("inf"), float("inf")
    sample, total = _sample(parts, low, high)
    if not 1 <= k <= total:
        raise IndexError(f"k = {k} is not in 1..{total}")
    below = 0  # elements strictly below `low`
    inside = total  # elements in [low, high]
    pivot = False  # split at one value instead of bracketing: always gets on, however many ties there are
    while True:
        a, b = _bracket(sample, (k - below - 0.5) / inside, low, high, pivot)
        less, within, values = _count(parts, a, b)
        if k <= sum(less):
            high = float(np.nextafter(np.float32(a), np.float32(-np.inf)))
            inside = sum(less) - below
        elif k > sum(less) + sum(within):
            low = float(np.nextafter(np.float32(b), np.float32(np.inf)))
            below, inside = sum(less) + sum(within), inside - (sum(less) + sum(within) - below)
        elif a == b:
            return a, less, within
        elif values is not None:
            ranked = torch.cat(values).cpu().numpy()
            value = float(np.partition(ranked, k - sum(less) - 1)[k - sum(less) - 1])
            under = [_true(part < value) for part in values]
            equal = [_true(part == value) for part in values]
            return value, [n + m for n, m in zip(less, under, strict=True)], equal
        else:
            low, high, below, inside = a, b, sum(less), sum(within)
            pivot = True
        sample, _ = _sample(parts, low, high)


def _halved(parts: Sequence[Callable[[], Keys]]) -> tuple[bool, list[Callable[[], Keys]]]:
    """Whether the first part is magnitudes of 16 bits; and the parts, of which the first need not be asked again."""
    if not parts:
        return False, []
    held = [parts[0]()]
    halved = isinstance(held[0], Magnitudes) and halves.serves(held[0].weights)
    return halved, [lambda: held.pop() if held else parts[0](), *parts[1:]]


def _cut_of_halves(parts: Sequence[Callable[[], Keys]], k: int) -> tuple[float, list[int], list[int]] | None:
    """The same where all parts are magnitudes of one 16-bit type; None where they are not."""
    counts, kinds = [], set()
    for part in parts:
        keys = part()
        if not (isinstance(keys, Magnitudes) and halves.serves(keys.weights)):
            return None
        counts.append(halves.count_by_magnitude(keys.weights).astype(np.uint32))
        kinds.add(keys.weights.dtype)
        if len(kinds) > 1:
            return None
    total = sum(int(part.sum()) for part in counts)
    if not 1 <= k <= total:
        raise IndexError(f"k = {k} is not in 1..{total}")
    code, below, equal = halves.cut_of_counts(counts, k)
    return halves.magnitude_of(code, kinds.pop()), below, equal


def _sample(
    parts: Sequence[Callable[[], Keys]], low: float, high: float, every: int = 8
) -> tuple[Float[np.ndarray, " n"], int]:
    """Evenly spread elements of those in [low, high], sorted; and the number of all elements.

    How many there are is known at the end only, so the sample is thinned on the way. Of large tensors only one element
    in `every` is held against bounds, unless too few pass.
    """
    taken: list[Tensor] = []
    total, seen, stride, bounded = 0, 0, 1.0, low > -float("inf") or high < float("inf")
    for part in parts:
        keys = part()
        absolute, flat = isinstance(keys, Magnitudes), _tensor(keys).reshape(-1)
        total += flat.numel()
        if bounded:
            flat = flat[::every] if flat.numel() > SAMPLE else flat
            absolute, flat = False, flat.abs() if absolute else flat
            flat = flat[(flat >= low) & (flat <= high)]
        seen += flat.numel()
        while seen / stride > STRIDE * min(SAMPLE, seen ** (2 / 3) + 1):
            stride *= STRIDE
            taken = [_every(STRIDE, piece) for piece in taken]
        few = _every(stride, flat).float()
        taken.append(few.abs_() if absolute else few)
    if bounded and every > 1 and seen < ENOUGH:
        return _sample(parts, low, high, every=1)
    return np.sort(torch.cat(taken).cpu().numpy()), total


def _tensor(keys: Keys) -> Tensor:
    return keys.weights if isinstance(keys, Magnitudes) else keys


def _every(stride: float, flat: Shaped[Tensor, " n"]) -> Shaped[Tensor, " m"]:
    """A copy of one element in `stride`, from the first; a view would keep all of them in memory."""
    if stride == 1.0:
        return flat.clone()
    places = (torch.arange(math.ceil(flat.numel() / stride), dtype=torch.float64) * stride).long()
    return flat[places.clamp_(max=flat.numel() - 1).to(flat.device)]


def _bracket(
    sample: Float[np.ndarray, " n"], quantile: float, low: float, high: float, pivot: bool
) -> tuple[float, float]:
    """Sample values that enclose the quantile with five standard errors to spare; or, twice, the one at it."""
    n = len(sample)
    if pivot:
        at = float(sample[int(quantile * n)])
        return at, at
    spare = 5.0 * (quantile * (1 - quantile) / n) ** 0.5 * n + 5
    first, last = int(quantile * n - spare), int(quantile * n + spare) + 1
    return (low if first < 0 else float(sample[first])), (high if last >= n else float(sample[last]))


def _count(
    parts: Sequence[Callable[[], Keys]], a: float, b: float
) -> tuple[list[int], list[int], list[Tensor] | None]:
    """For each part how many are below a and how many in [a, b]; and those themselves unless they are too many."""
    less, within = [], []
    values: list[Tensor] | None = []
    for part in parts:
        under, inside, found = _count_one(part(), a, b)
        less.append(under)
        within.append(inside)
        kept = values is not None and found is not None and sum(within) <= 2 * CHUNK
        values = [*values, found] if kept else None  # type: ignore[misc, list-item]
    return less, within, values


def _count_one(keys: Keys, a: float, b: float) -> tuple[int, int, Tensor | None]:
    """How many scores are below a, how many in [a, b], and those themselves unless they are too many."""
    absolute = isinstance(keys, Magnitudes)
    if native.serves(_tensor(keys)):
        return native.between(_tensor(keys), a, b, absolute=absolute)
    scores = keys.scores() if isinstance(keys, Magnitudes) else keys
    counts, found = [0, 0], []
    for piece in scores.reshape(-1).split(CHUNK):
        array = _array(piece)
        under, upto = array < a, array <= b
        counts[0] += _true(under)
        counts[1] += _true(upto)
        found.append(torch.as_tensor(array[upto ^ under]).float())
    return counts[0], counts[1] - counts[0], torch.cat(found)


def _array(tensor: Tensor) -> Any:
    """numpy compares and counts four to six times faster than torch on a CPU; elsewhere torch does it."""
    return tensor.numpy() if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else tensor


def _true(marked: Any) -> int:
    return int(np.count_nonzero(marked)) if isinstance(marked, np.ndarray) else int(torch.count_nonzero(marked))


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
    if native.serves(_tensor(keys)):
        absolute = isinstance(keys, Magnitudes)
        return native.smallest(_tensor(keys), counts, absolute=absolute, guess=guess, others=True)
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
    if native.serves(_tensor(keys)):
        absolute = isinstance(keys, Magnitudes)
        return native.smallest(_tensor(keys), counts, absolute=absolute, guess=guess)
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
    marked = torch.as_tensor(_array(scores) < cut.value)
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
