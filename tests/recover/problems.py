"""Random layer problems whose inputs are correlated and differ in size, the `choose` of a recipe, small classifiers."""

import torch
from torch import Tensor, nn

from secateur import Recipe
from secateur.mend import Choice
from secateur.score import magnitude, wanda


def correlated(
    out: int, columns: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the second moment of their inputs."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(2, columns // 4), generator=draw, dtype=torch.float64)
    mix = torch.randn(few.shape[1], columns, generator=draw, dtype=torch.float64)
    sizes = torch.randn(columns, generator=draw, dtype=torch.float64).mul(0.5).exp()
    inputs = (few @ mix / few.shape[1] ** 0.5 + 0.5 * torch.randn(tokens, columns, generator=draw)) * sizes
    weight = torch.randn(out, columns, generator=draw, dtype=torch.float64)
    return weight.to(dtype), (inputs.t() @ inputs).to(dtype)


def choice(weight: torch.Tensor, moment: torch.Tensor | None, counts: torch.Tensor, **parts) -> Choice:
    """The choice of a recipe with these counts; by Wanda's score where a moment is given, else by magnitude."""
    if moment is None:
        return Choice(
            Recipe(magnitude, **parts), counts, tuple(weight.shape), lambda: magnitude(weight.float())
        )
    norm = moment.diagonal().clamp(min=0).sqrt().float()
    return Choice(Recipe(wanda, **parts), counts, tuple(weight.shape), lambda: wanda(weight.float(), norm))


def classifier(dropout: float = 0.0) -> nn.Sequential:
    """A small classifier with a vector that is no weight, a buffer that counts, and dropout on request."""
    layers = [nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 3)]
    return nn.Sequential(*layers)


def examples(count: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows whose class is that of their largest squared entry among three."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :3] ** 2).argmax(1)


def batches(count: int = 160, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`examples` in batches."""
    x, y = examples(count, seed)
    return list(zip(x.split(size), y.split(size), strict=True))
