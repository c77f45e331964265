"""What a fit returns: a callable that takes vectors of one space to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from ..errors import UsageError
from .embeddings import Embeddings

__all__ = ["Affine", "Concatenation", "Joint"]


@dataclass(frozen=True, eq=False)
class Affine:
    """`y = x @ matrix + shift`, from the space `source` to the space `target`.

    Attributes:
        matrix: "in out", double precision.
        shift: "out", double precision.
        source: the space that it takes; None where the fit was given bare tensors.
        target: the space that it gives; None as above.
        settings: how it was fitted, in plain words and numbers.
    """

    matrix: Tensor
    shift: Tensor
    source: str | None = None
    target: str | None = None
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.matrix.dim() != 2 or self.shift.shape != self.matrix.shape[1:]:
            raise UsageError(
                f"a map has a matrix (in, out) and a shift (out), got shapes {tuple(self.matrix.shape)} and "
                f"{tuple(self.shift.shape)}"
            )

    @overload
    def __call__(self, vectors: Embeddings) -> Embeddings: ...
    @overload
    def __call__(self, vectors: Tensor) -> Tensor: ...
    def __call__(self, vectors: Embeddings | Tensor) -> Embeddings | Tensor:
        """Vectors of the source as vectors of the target; a bare tensor gives a bare tensor of its own type.

        Raises:
            UsageError: vectors of another space or width.
        """
        values = _taken(vectors, self.source, int(self.matrix.shape[0]))
        mapped = (values.double() @ self.matrix.to(values.device) + self.shift.to(values.device)).to(
            values.dtype
        )
        return Embeddings(mapped, self.target or "mapped") if isinstance(vectors, Embeddings) else mapped

    def __repr__(self) -> str:
        width = " x ".join(map(str, self.matrix.shape))
        how = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"Affine({self.source!r} -> {self.target!r}, {width}{', ' + how if how else ''})"


@dataclass(frozen=True, eq=False)
class Joint:
    """Two maps into one space in which the models agree as far as they can (canonical correlations).

    Attributes:
        first: from the first model's space to the joint one.
        second: from the second model's space to the joint one.
        across: from the first model's space to the second's, through the joint one.
        correlations: of each joint axis between the two models, descending.
    """

    first: Affine
    second: Affine
    across: Affine
    correlations: Tensor

    def __call__(self, vectors: Embeddings) -> Embeddings:
        """Vectors of either model in the joint space.

        Raises:
            UsageError: bare tensors, which do not say whose they are, or vectors of a third model.
        """
        if not isinstance(vectors, Embeddings):
            raise UsageError(
                "a joint space takes vectors of two models and bare tensors do not say whose they are; wrap them in "
                "align.Embeddings, or call .first or .second"
            )
        for side in (self.first, self.second):
            if vectors.space == side.source:
                return side(vectors)
        raise UsageError(
            f"this joint space is of {self.first.source!r} and {self.second.source!r}, got vectors of "
            f"{vectors.space!r}"
        )

    def __repr__(self) -> str:
        return (
            f"Joint({self.first.source!r} and {self.second.source!r}, {len(self.correlations)} axes, correlations "
            f"{float(self.correlations[0]):.3f} to {float(self.correlations[-1]):.3f})"
        )


@dataclass(frozen=True, eq=False)
class Concatenation:
    """The vectors of several models side by side, each normalised first, so that none drowns the others.

    Attributes:
        parts: one map a model, which centres and scales.
        unit: whether each part is then scaled to length 1, so that a cosine of the whole is the weighted mean of
            the parts' cosines.
        weights: of the parts' squared lengths, adding up to 1.
        target: name of the space of the whole.
    """

    parts: tuple[Affine, ...]
    unit: bool
    weights: tuple[float, ...]
    target: str

    def __call__(self, *models: Embeddings | Tensor) -> Embeddings:
        """The same texts' vectors of every model, in the order of the fit, as vectors of the joint space.

        Raises:
            UsageError: too few models, another order, or unequal numbers of vectors.
        """
        if len(models) != len(self.parts):
            raise UsageError(f"{len(self.parts)} models were concatenated, got the vectors of {len(models)}")
        if len({len(vectors) for vectors in models}) > 1:
            raise UsageError(f"every model must embed the same texts, got {[len(v) for v in models]} vectors")
        columns = []
        for part, weight, vectors in zip(self.parts, self.weights, models, strict=True):
            given = _taken(vectors, part.source, int(part.matrix.shape[0])).double()
            scaled = given @ part.matrix.to(given.device) + part.shift.to(given.device)
            if self.unit:
                scaled = torch.nn.functional.normalize(scaled, dim=1)
            columns.append(weight**0.5 * scaled)
        return Embeddings(torch.cat(columns, dim=1), self.target)

    def __repr__(self) -> str:
        names = " and ".join(repr(part.source) for part in self.parts)
        return f"Concatenation({names}, weights {', '.join(f'{w:.3g}' for w in self.weights)})"


def _taken(vectors: Embeddings | Tensor, space: str | None, width: int) -> Tensor:
    """The numbers, if a map from `space` of this width may take them."""
    values = vectors.values if isinstance(vectors, Embeddings) else vectors
    if isinstance(vectors, Embeddings) and space is not None and vectors.space != space:
        raise UsageError(f"this map takes vectors of {space!r}, got vectors of {vectors.space!r}")
    if values.shape[-1] != width:
        raise UsageError(
            f"this map takes vectors of width {width}{'' if space is None else f' ({space!r})'}, got width "
            f"{values.shape[-1]}"
        )
    return values
