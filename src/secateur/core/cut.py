"""The exact k-th smallest of many tensors: a sample brackets it, a pass counts, what is left is sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.core import halves, native

__all__ = ["CHUNK", "Cut", "Keys", "Magnitudes", "array_of", "cut_by_part", "kth_smallest", "tensor_of"]

# Elements looked at in one go: large enough to hide Python, small enough to stay in the cache hierarchy
# and to keep the extra memory of a 100-million-weight model at a few megabytes.
CHUNK = 1 << 21
# A larger sample costs more to sort than its narrower bracket saves to rank.
SAMPLE = 1 << 17
# Of a sample within bounds; where fewer are found all elements are held against them.
ENOUGH = 1 << 12
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
            inside, pivot = sum(less) - below, False
        elif k > sum(less) + sum(within):
            low = float(np.nextafter(np.float32(b), np.float32(np.inf)))
            below, inside = sum(less) + sum(within), inside - (sum(less) + sum(within) - below)
            pivot = False
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
        absolute, flat = isinstance(keys, Magnitudes), tensor_of(keys).reshape(-1)
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


def tensor_of(keys: Keys) -> Tensor:
    """The scores, or the weights whose magnitudes they are."""
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
        if sample[n // 4] == sample[3 * n // 4]:  # ties: once they are told apart half of what is left is gone
            at = float(sample[n // 2])
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
    if native.serves(tensor_of(keys)):
        return native.between(tensor_of(keys), a, b, absolute=absolute)
    scores = keys.scores() if isinstance(keys, Magnitudes) else keys
    counts, found = [0, 0], []
    for piece in scores.reshape(-1).split(CHUNK):
        array = array_of(piece)
        under, upto = array < a, array <= b
        counts[0] += _true(under)
        counts[1] += _true(upto)
        found.append(torch.as_tensor(array[upto ^ under]).float())
    return counts[0], counts[1] - counts[0], torch.cat(found)


def array_of(tensor: Tensor) -> Any:
    """numpy compares and counts four to six times faster than torch on a CPU; elsewhere torch does it."""
    return tensor.numpy() if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else tensor


def _true(marked: Any) -> int:
    return int(np.count_nonzero(marked)) if isinstance(marked, np.ndarray) else int(torch.count_nonzero(marked))
