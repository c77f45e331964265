"""Training data: any sized iterable of batches, walked in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.core.digest import digest
from secateur.errors import UsageError

__all__ = ["Shuffled", "identity", "trainable"]


class Shuffled:
    """A list of batches, dealt anew every time it is walked through, in an order of torch's generator.

    Where all batches hold rows of equal shapes, the rows themselves are mixed into batches of the first one's size;
    else whole batches take turns (windows padded to different lengths, for instance).

    Args:
        batches: tensors, pairs or mappings, at least one.

    Example:
        >>> dealt = list(Shuffled([torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5])]))
        >>> [len(batch) for batch in dealt], sorted(torch.cat(dealt).tolist())
        ([2, 2, 1], [1, 2, 3, 4, 5])
    """

    def __init__(self, batches: Sequence[Any]):
        self.batches = list(batches)
        counts = [_rows(batch) for batch in self.batches]
        alike = len({_form(batch) for batch in self.batches}) == 1
        self.mixed = alike and all(counts)
        self.size = counts[0] if self.mixed else 0
        self.places = [(i, row) for i, count in enumerate(counts) for row in range(count)] if self.mixed else []

    def __len__(self) -> int:
        return -(-len(self.places) // self.size) if self.mixed else len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.places) if self.mixed else len(self.batches)).tolist()
        if not self.mixed:
            yield from (self.batches[place] for place in order)
            return
        for first in range(0, len(order), self.size):
            yield self._gathered([self.places[place] for place in order[first : first + self.size]])

    def _gathered(self, places: list[tuple[int, int]]) -> Any:
        chosen = [_taken(self.batches[batch], row) for batch, row in places]
        return _stacked(chosen)


def trainable(data: Any) -> Any:
    """Check data that will be walked through once an epoch; a list is shuffled, anything else decides for itself.

    Raises:
        UsageError: one batch instead of several, something without a length, or nothing.
    """
    if isinstance(data, Mapping | Tensor | str) or not hasattr(data, "__iter__"):
        raise UsageError(
            f"data is {type(data).__name__}; expected a list of batches, a DataLoader, or anything that can be walked "
            "through again each epoch"
        )
    if iter(data) is data or not hasattr(data, "__len__"):
        raise UsageError(
            "data can be walked through only once, or do not know their length; give a list of batches, a DataLoader, "
            "or an object with __len__ and __iter__"
        )
    if len(data) == 0:
        raise UsageError("data hold no batch; training needs at least one")
    return Shuffled(data) if isinstance(data, list | tuple) else data


def identity(data: Iterable[Any], seed: int) -> str:
    """SHA-256 of the data; one pass over an epoch of them, without the model.

    What draws at random (a shuffling loader) is walked through under `seed`.
    """
    if isinstance(data, Shuffled):
        return digest(data.batches)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return digest([digest(batch) for batch in data])


def _form(batch: Any) -> Any:
    """What must agree for rows of two batches to be mixed: nesting, names, types and the rows' shapes."""
    if isinstance(batch, Tensor):
        return batch.dtype, batch.shape[1:]
    if isinstance(batch, Mapping):
        return tuple((key, _form(value)) for key, value in batch.items())
    if isinstance(batch, list | tuple):
        return tuple(_form(value) for value in batch)
    return type(batch)


def _rows(batch: Any) -> int:
    """The number of rows of all tensors in a batch; 0 where they do not agree, or something else is among them."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 0
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(parts, list | tuple) or not parts:
        return 0
    counts = {_rows(part) for part in parts}
    return counts.pop() if len(counts) == 1 else 0


def _taken(batch: Any, row: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[row]
    if isinstance(batch, Mapping):
        return {key: _taken(value, row) for key, value in batch.items()}
    return tuple(_taken(value, row) for value in batch)


def _stacked(rows: list[Any]) -> Any:
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.stack(rows)
    if isinstance(first, Mapping):
        return {key: _stacked([row[key] for row in rows]) for key in first}
    return tuple(_stacked([row[place] for row in rows]) for place in range(len(first)))
