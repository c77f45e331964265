"""How long method `best` will take, from one forward pass: a warning before anything is changed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.best import HIGH, SCOUT
from secateur.core.forward import call, device_of, move, undisturbed
from secateur.core.where import Layer
from secateur.prune import Plan

__all__ = ["LONG", "Estimate", "estimate", "in_words", "warning"]

LONG = 60.0  # seconds; what takes less needs no warning
BACKWARD = 3  # forward passes that a forward and backward pass cost
COLLECTING = 2  # forward passes for the inputs and the dense outputs that reconstruction is fitted to
SUPPORT = 60  # iterations of ALPS, which stops by itself
EIGEN = 25  # times in^3 multiply-adds of an eigendecomposition, twice that in float64


@dataclass(frozen=True)
class Estimate:
    """Seconds of pruning, without measuring before and after.

    Attributes:
        best, alps, wanda: of these methods.
        speed: tokens a second in the forward pass that this was taken from.
        tokens: of calibration.
    """

    best: float
    alps: float
    wanda: float
    speed: float
    tokens: int


def estimate(model: nn.Module, example: Any, tokens: int, todo: Plan) -> Estimate:
    """Time a forward pass, and count what each method makes of it.

    `best` prunes by ALPS and reconstructs for two epochs each allocation that it may try, then reconstructs the best
    of them; see `best_`. An epoch is a forward and a backward pass. Short passes are slower a token than long ones, so
    the estimate is rather too long; it knows nothing of other load on the machine.

    Args:
        example: one input of the model.
        tokens: of calibration.
        todo: the plan.

    Cost: two forward passes of the example.
    """
    sparsity = 0.5 if todo.recipe.fixed_by_pattern else todo.sparsity or 0.0
    tried = 1 if todo.recipe.fixed_by_pattern else 3 if sparsity < HIGH else 6
    epochs = 15 if sparsity >= HIGH and not todo.recipe.fixed_by_pattern else 10
    speed = _speed(model, example)
    solving = 1 + _solving(todo.layers, tokens)
    scouting = SCOUT * BACKWARD + COLLECTING
    passes = tried * (solving + scouting) + epochs * BACKWARD + COLLECTING
    one = tokens / speed
    return Estimate(passes * one, solving * one, one, speed, tokens)


def warning(found: Estimate) -> str | None:
    """A sentence for the plan; None where there is nothing to wait for."""
    if found.best < LONG:
        return None
    return (
        f"Method best may take about {in_words(found.best)} here, judged by a short forward pass ({found.speed:,.0f} "
        f"tokens a second) and {found.tokens:,} tokens of calibration. Faster: --method alps, about "
        f"{in_words(found.alps)}, or --method wanda, about {in_words(found.wanda)}; fewer --samples save in proportion."
    )


def in_words(seconds: float) -> str:
    """A time that nobody takes for exact.

    Example:
        >>> in_words(0.2), in_words(42), in_words(340), in_words(9000)
        ('1 second', '40 seconds', '6 minutes', '2.5 hours')
    """
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds < 10 else f"{round(seconds, -1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _speed(model: nn.Module, example: Any) -> float:
    """Tokens a second of the faster of two passes; the first may still have to load something."""
    given = move(example, device_of(model))
    sizes = [leaf.numel() for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    taken = []
    with undisturbed(model):
        for _ in range(2):
            start = time.perf_counter()
            call(model, given)
            taken.append(time.perf_counter() - start)
    return max(sizes, default=1) / max(min(taken), 1e-9)


def _solving(layers: Iterable[Layer], tokens: int) -> float:
    """What ALPS itself computes, in forward passes of these layers: products and an eigendecomposition."""
    solver = forward = 0.0
    for layer in layers:
        part, out, columns = layer.layout.shape
        solver += part * (2 * SUPPORT * out * columns**2 + 2 * EIGEN * columns**3)
        forward += part * out * columns * tokens
    return solver / max(forward, 1.0)
