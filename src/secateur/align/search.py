"""Nearest neighbours of one space, and how much two lists of neighbours agree."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import UsageError
from .embeddings import Embeddings, same_space

__all__ = ["neighbours", "overlap", "similarity"]

_CHUNK = 1 << 24  # similarities computed at once: 128 MB


def similarity(one: Embeddings, two: Embeddings) -> Float[Tensor, " rows"]:
    """Cosine of each vector of `one` with the vector of `two` in the same row.

    Raises:
        UsageError: two spaces, two widths, bare tensors, or unequal numbers of rows.
    """
    one, two = same_space(one, two, "similarity")
    if len(one) != len(two):
        raise UsageError(f"similarity compares row by row, got {len(one)} and {len(two)} vectors")
    return (one.normalized().values * two.normalized().values).sum(1)


def neighbours(
    queries: Embeddings, index: Embeddings, k: int = 10, *, exclude_self: bool = False
) -> Int64[Tensor, "queries k"]:
    """The rows of the index with the greatest cosine to each query, best first; an exact search.

    Args:
        queries, index: vectors of one space.
        k: how many neighbours.
        exclude_self: the queries are the index, and no row is its own neighbour.

    Raises:
        UsageError: two spaces, bare tensors, or k out of range.

    Cost: queries x index x width multiplications, 128 MB of memory.
    """
    queries, index = same_space(queries, index, "neighbours")
    if exclude_self and len(queries) != len(index):
        raise UsageError(
            f"exclude_self is for an index searched by itself, got {len(queries)} queries and {len(index)} rows"
        )
    most = len(index) - exclude_self
    if not isinstance(k, int) or not 1 <= k <= most:
        raise UsageError(f"k is {k}, expected a whole number from 1 to the {most} vectors that can be found")
    columns, rows, found = index.normalized().values.T, queries.normalized().values, []
    step = max(1, _CHUNK // len(index))
    for start in range(0, len(rows), step):
        cosines = rows[start : start + step] @ columns
        if exclude_self:
            own = torch.arange(start, start + len(cosines))
            cosines[own - start, own] = -torch.inf
        found.append(cosines.topk(k, dim=1).indices)
    return torch.cat(found)


def overlap(found: Int64[Tensor, "queries k"], truth: Int64[Tensor, "queries k"]) -> Float[Tensor, " queries"]:
    """Which part of each query's true neighbours was found, whatever their order (overlap@k, in [0, 1]).

    Raises:
        UsageError: two lists of different shapes.

    Example:
        >>> overlap(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [4, 5]])).tolist()
        [1.0, 0.5]
    """
    if found.shape != truth.shape or found.dim() != 2:
        raise UsageError(
            f"overlap compares two lists of the same queries and k, got shapes {tuple(found.shape)} and "
            f"{tuple(truth.shape)}"
        )
    return (found[:, :, None] == truth[:, None, :]).any(2).double().mean(1)
