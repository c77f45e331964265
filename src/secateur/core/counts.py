"""How many weights are zero: by layer, in all prunable layers, in the whole model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from secateur.core.forward import unwrapped
from secateur.core.masks import named_parameters
from secateur.core.tied import same_tensor, tied_names
from secateur.core.where import layers

__all__ = ["Count", "Sparsity", "distinct_parameters", "sparsity"]


@dataclass(frozen=True)
class Count:
    """Zeros among a number of weights."""

    size: int
    zeros: int

    @property
    def nonzeros(self) -> int:
        """Weights that are not zero."""
        return self.size - self.zeros

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the weights counted here."""
        return self.zeros / self.size if self.size else 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.size + other.size, self.zeros + other.zeros)


@dataclass(frozen=True)
class Sparsity:
    """The zeros of a model.

    Attributes:
        layers: parameter name -> count, for every matrix (embeddings included).
        prunable: all matrices but embeddings together.
        model: every parameter, tied ones once.
    """

    layers: dict[str, Count]
    prunable: Count
    model: Count

    def __str__(self) -> str:
        width = max([len(name) for name in self.layers] + [len("prunable layers")])
        rows = [*self.layers.items(), ("prunable layers", self.prunable), ("whole model", self.model)]
        head = f"{'':{width}}  {'weights':>14}  {'zeros':>14}  {'non-zeros':>14}  sparsity"
        lines = [
            f"{name:{width}}  {c.size:14,}  {c.zeros:14,}  {c.nonzeros:14,}  {c.sparsity:8.4f}"
            for name, c in rows
        ]
        return "\n".join([head, *lines])


def sparsity(model: nn.Module) -> Sparsity:
    """Count the zeros of a model.

    Cost: one pass over the weights.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> sparsity(layer).prunable
        Count(size=8, zeros=8)
    """
    model = unwrapped(model)
    counted = {}
    prunable = Count(0, 0)
    for layer in layers(model):
        counted[layer.name] = _count(layer.weight)
        if layer.role != "embedding":
            prunable += counted[layer.name]
    whole = sum((_count(p) for p in distinct_parameters(model).values()), Count(0, 0))
    return Sparsity(counted, prunable, whole)


def distinct_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, under its first name; two parameter objects on the same memory are one, too.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = nn.Parameter(model[0].weight.data)
        >>> list(distinct_parameters(model))
        ['0.weight']
    """
    tied = tied_names(model)
    found: dict[str, nn.Parameter] = {}
    for name, parameter in named_parameters(model).items():
        twins = (found[other] for other in tied.get(name, ()) if other in found)
        if not any(same_tensor(parameter, twin) for twin in twins):
            found[name] = parameter
    return found


def _count(tensor: torch.Tensor) -> Count:
    return Count(tensor.numel(), tensor.numel() - int(torch.count_nonzero(tensor)))
