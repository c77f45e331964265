"""How long method `best` will take, from one block of the model that is timed: a warning before anything is changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.best import SCOUT, most_epochs, most_tried
from secateur.core.forward import call, device_of, move, undisturbed
from secateur.core.visit import split
from secateur.core.where import Layer
from secateur.prune import Plan, prune_
from secateur.recipes import Recipe, alps
from secateur.recover import ALPS, Updated
from secateur.recover.quadratic import pose
from secateur.recover.rehearsal import Clock, Rehearsed, rehearse, timed
from secateur.recover.update import Choose

__all__ = ["LONG", "Estimate", "estimate", "in_words", "warning"]

LONG = 60.0  # seconds; what takes less needs no warning
ROWS = 4  # sequences that reconstruction takes a step with
POSITIONS = 2048  # fewer sequences are timed where these are more tokens, at least one
LARGEST = 768  # inputs and outputs of a matrix on which ALPS is timed; larger ones are counted from it
SEARCH = 35  # iterations after which ALPS stops: 34 to 35 in every layer of the models of docs/results.md
SEEING = 5  # forward passes of a few sequences in which reconstruction sees how the model runs
EIGHTH = 0.125  # of the data judges, the rest is fitted to


@dataclass(frozen=True)
class Estimate:
    """Seconds of pruning, without measuring before and after.

    Attributes:
        best, alps, wanda: of these methods.
        speed: tokens a second in the forward pass of the blocks.
        tokens: of calibration.
    """

    best: float
    alps: float
    wanda: float
    speed: float
    tokens: int


def estimate(
    model: nn.Module, piece: Any, tokens: int, todo: Plan, *, clock: Clock = time.perf_counter
) -> Estimate:
    """Time one block and what `best` does with it, and count what is to be done with all of them.

    Measured are a forward pass of the first block, a step of its reconstruction, and ALPS on matrices of its sizes,
    of at most 768 x 768; other blocks take in proportion to their weights. Not foreseen: load of the machine that
    comes or goes later, allocations that are given up, reconstruction that stops early.

    Args:
        model: not changed.
        piece: calibration data, of which at most four sequences are used, fewer where they are long.
        tokens: of calibration in all.
        todo: the plan.
        clock: what time is told by.

    Cost: a few passes of these sequences through one block, forward and backward, two forward passes of one of them
        through the model, and a second or two of solving; without blocks, forward passes of the whole.
    """
    given = split(move(piece, device_of(model)), ROWS)[0]
    given = split(given, max(1, ROWS * POSITIONS // max(_tokens(given), POSITIONS)))[0]
    count = _tokens(given)
    first, path = _first_block(todo.layers)
    weights = sum(layer.size for layer in todo.layers) / sum(layer.size for layer in first)
    if path is None:
        with undisturbed(model):
            seconds = timed(lambda: call(model, given), clock)
        rehearsed = Rehearsed(seconds, 0.0, 0.0, 0, tuple((layer,) for layer in first), False)
    else:
        rehearsed = rehearse(model, path, first, given, clock=clock)
    share = tokens / count
    forward = rehearsed.forward * share * weights
    solving = weights * _solving(rehearsed.shared, tokens, todo.recipe, clock)
    judging = EIGHTH * forward * (1 + _outside(model, todo.layers))

    def rebuilding(epochs: int) -> float:
        """Inputs and outputs of every sub-module, found in either model; then the epochs."""
        if path is None:
            return 0.0
        fitted = (1 - EIGHTH) * share * weights
        if rehearsed.chain:
            # to each sub-module from its block's start, half of the block in either model, and on to the next block
            found = (1 - EIGHTH) * forward * (rehearsed.submodules + 2) + SEEING * rehearsed.forward * weights
        else:
            found = (1 - EIGHTH) * forward * rehearsed.submodules * weights  # from the model's start
        return found + fitted * (epochs * rehearsed.step + (epochs + 1) * rehearsed.judged / 16)

    pruning = forward + solving
    tried = most_tried(todo)
    best = tried * (pruning + rebuilding(SCOUT) + 2 * judging) + rebuilding(most_epochs(todo)) + 2 * judging
    return Estimate(best, pruning, forward, tokens / max(forward, 1e-9), tokens)


def warning(found: Estimate) -> str | None:
    """A sentence for the plan; None where there is nothing to wait for."""
    if found.best < LONG:
        return None
    return (
        f"Method best may take about {in_words(found.best)} here, judged by one block that was timed "
        f"({found.speed:,.0f} tokens a second forward) and {found.tokens:,} tokens of calibration. Faster: --method "
        f"alps, about {in_words(found.alps)}, or --method wanda, about {in_words(found.wanda)}; fewer --samples save "
        "in proportion."
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


def _tokens(piece: Any) -> int:
    """Positions of the largest tensor: what a forward pass takes in proportion to."""
    given = piece.get("input_ids", piece) if isinstance(piece, Mapping) else piece
    return max((leaf.numel() for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)), default=1)


def _first_block(layers: Iterable[Layer]) -> tuple[list[Layer], str | None]:
    """The chosen layers of the first block that has any, and its path; all layers where there are no blocks."""
    chosen = list(layers)
    inside = next((layer for layer in chosen if layer.block is not None), None)
    if inside is None:
        return chosen, None
    parts = inside.path.split(".")
    path = ".".join(parts[: parts.index(str(inside.block)) + 1])
    return [layer for layer in chosen if layer.path.startswith(f"{path}.")], path


def _outside(model: nn.Module, chosen: Iterable[Layer]) -> float:
    """The output head's weights beside those of the blocks: what a whole forward pass takes longer."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    weight = getattr(head, "weight", None)
    return weight.numel() / sum(layer.size for layer in chosen) if isinstance(weight, Tensor) else 0.0


def _solving(shared: Iterable[Iterable[Layer]], tokens: int, recipe: Recipe, clock: Clock) -> float:
    """Seconds of ALPS in these layers without the forward pass; those together that share a moment."""
    known: dict[tuple[int, int], _Probe] = {}
    total = 0.0
    for group in shared:
        solved = 0.0
        for layer in group:
            part, out, columns = layer.layout.shape
            if (out, columns) not in known:
                known[out, columns] = _Probe(out, columns, clock).measured(recipe)
            probe = known[out, columns]
            total += part * probe.search
            solved = max(solved, part * (probe.solve + probe.moment * tokens))
        total += solved
    return total


class _Probe:
    """An update that does what ALPS does and tells the time, on a random matrix.

    Attributes:
        moment: seconds that a token adds.
        solve: factors and eigenvectors of the moment.
        search: support and weights.
    """

    def __init__(self, out: int, columns: int, clock: Clock):
        self.out, self.columns, self.clock = out, columns, clock
        self.moment = self.solve = self.search = 0.0

    def measured(self, recipe: Recipe) -> _Probe:
        """Time it, with the recipe's own pattern and allocation."""
        group = getattr(recipe.pattern, "m", 1)
        width = min(self.columns, max(group, LARGEST // group * group))
        inputs = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]):
            layer = nn.Linear(width, min(self.out, LARGEST), bias=False)
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
            prune_(
                layer, None if recipe.fixed_by_pattern else 0.5, replace(alps, pattern=recipe.pattern, update=self),
                data=[inputs], only="all",
            )  # fmt: skip
        summed = timed(lambda: inputs.t() @ inputs, self.clock) / len(inputs)
        self.moment = summed * (self.columns / width) ** 2
        return self

    def __call__(self, weight: Tensor, choose: Choose, second_moment: Tensor) -> Updated:
        """Called by `prune_` with what ALPS would get."""
        rows, width = weight.shape
        self.solve = timed(lambda: pose(weight, second_moment.clone()).known.spectrum, self.clock)
        pose(weight, second_moment).known.spectrum  # noqa: B018 - kept for what follows
        short, longer = (
            timed(lambda k=k: ALPS(iterations=k)(weight, choose, second_moment), self.clock)  # type: ignore[misc]
            for k in (3, 9)
        )
        search = short + (SEARCH - 3) * max(0.0, longer - short) / 6
        self.search = search * (self.out / rows) * (self.columns / width) ** 2
        self.solve *= (self.columns / width) ** 3
        mask = choose()
        return Updated(weight * mask, mask)
