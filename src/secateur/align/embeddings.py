"""Vectors with the name of the model that made them, so that two models are never compared by accident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import NumericError, UsageError

__all__ = ["Embeddings", "Floats", "same_space", "values_of"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One vector a row, and the space that they live in.

    Two models put the same text at places that have nothing to do with each other: the axes of a trained space
    are arbitrary, and even a pruned copy of a model drifts from it. So vectors carry the name of their space, and
    every comparison checks it.

    Attributes:
        values: "rows width", finite.
        space: the name of the model, or whatever tells its vectors from those of others.

    Example:
        >>> Embeddings(torch.eye(3), "original")
        Embeddings(3 vectors of width 3 in the space 'original')
    """

    values: Tensor
    space: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _checked(self.values, f"the vectors of {self.space!r}"))
        if not isinstance(self.space, str) or not self.space:
            raise UsageError(f"space is {self.space!r}, expected the name of the model that made the vectors")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Embeddings:
        """The same space, fewer vectors."""
        if isinstance(rows, int):
            raise UsageError("one row is no set of vectors; take a slice, as embeddings[3:4]")
        return Embeddings(self.values[rows], self.space)

    def __repr__(self) -> str:
        return f"Embeddings({len(self)} vectors of width {self.width} in the space {self.space!r})"

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.values.shape[1])

    def normalized(self) -> Embeddings:
        """Every vector scaled to length 1; a vector of zeros stays.

        Cost: one pass, one copy.
        """
        return Embeddings(torch.nn.functional.normalize(self.values.double(), dim=1), self.space)


def same_space(one: object, two: object, doing: str) -> tuple[Embeddings, Embeddings]:
    """Both as `Embeddings` of one space, or the reason why they cannot be compared.

    Raises:
        UsageError: a vector without a space, two spaces, or two widths.
    """
    for given in (one, two):
        if not isinstance(given, Embeddings):
            raise UsageError(
                f"{doing} needs vectors that say which model made them, got {type(given).__name__}. Wrap them: "
                "align.Embeddings(vectors, 'name of the model')"
            )
    assert isinstance(one, Embeddings)
    assert isinstance(two, Embeddings)
    if one.space != two.space:
        raise UsageError(
            f"{doing}: vectors of {one.space!r} and of {two.space!r} cannot be compared. The axes of two trained "
            "spaces have nothing to do with each other, so their cosines and distances say nothing, even where the "
            "widths agree and one model was pruned from the other. Fit a map on texts that both have embedded, "
            f"map = align.ridge(source, target), and compare map(vectors of {one.space!r}) with the vectors of "
            f"{two.space!r}"
        )
    if one.width != two.width:
        raise UsageError(
            f"{doing}: vectors of width {one.width} and of width {two.width} in one space {one.space!r}; one of them "
            "has the wrong name"
        )
    return one, two


def values_of(given: Embeddings | Tensor | npt.ArrayLike, name: str) -> Floats:
    """Rows in double precision on the CPU, whatever holds them."""
    tensor = given.values if isinstance(given, Embeddings) else _checked(given, name)
    return tensor.detach().cpu().double().numpy()


def _checked(values: Any, name: str) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if tensor.dim() != 2 or not tensor.dtype.is_floating_point or not tensor.shape[1]:
        raise UsageError(
            f"{name}: expected a matrix of real numbers with one vector a row, got shape {tuple(tensor.shape)} of "
            f"{tensor.dtype}"
        )
    if not bool(tensor.isfinite().all()):
        rows = (~tensor.isfinite().all(dim=1)).nonzero().flatten()
        raise NumericError(
            f"{name}: NaN or Inf in {len(rows)} of {len(tensor)} vectors, the first in row {int(rows[0])}; look at "
            "the text and at the model that made it"
        )
    return tensor
