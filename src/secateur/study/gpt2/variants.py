"""The rows of the study: how each model is made from the baseline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from secateur import evaluate
from secateur.core.depth import series
from secateur.core.masks import Masks
from secateur.deploy import drop_blocks, merge_blocks
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.prune import prune_
from secateur.recipes import global_magnitude
from secateur.recover import distill_

from .given import Given, Plan

__all__ = ["Made", "variants"]

# 104.69 million of GPT-2's 124,439,808 parameters
GPT2, KEPT = 124_439_808, 104_690_000


@dataclass(frozen=True)
class Made:
    """A model of the study, and the masks that hold its zeros where it has any."""

    model: nn.Module
    masks: Masks | None = None


Maker = Callable[[], Made]


def variants(
    base: nn.Module, smaller: nn.Module | None, given: Given, plan: Plan, tell: Tell
) -> tuple[dict[str, Maker], tuple[str, ...]]:
    """Name -> how to make the model, and remarks on what is left out or was chosen.

    Raises:
        UsageError: a model with fewer than two blocks, or without a list of blocks.
    """
    lists = series(base)
    depth = max((len(each.blocks) for each in lists), default=0)
    if len(lists) != 1 or depth < 2:
        raise UsageError(
            f"the model has {len(lists)} lists of repeated blocks, the longest of {depth}; the study merges the blocks "
            "of one list of at least 2"
        )
    whole = int(evaluate.parameters(base).value)
    keep = plan.nonzero if plan.nonzero is not None else round(whole * KEPT / GPT2)
    groups = [n for n in plan.groups if n <= depth]
    made: dict[str, Maker] = {
        "baseline": lambda: Made(copy.deepcopy(base)),
        "smaller": lambda: Made(
            copy.deepcopy(smaller) if smaller is not None else _distilled(base, given, plan, tell)
        ),
        "pruned": lambda: _pruned(base, keep),
    }
    for compress, word in ((False, "merged"), (True, "compressed")):
        for n in groups:
            made[f"{word}_{n}"] = partial(_merged, base, n, compress)
    notes = [
        "smaller: the model given."
        if smaller is not None
        else "smaller: every second block of the baseline, distilled from it on the text that all rows are fine-tuned "
        "on, the way DistilGPT-2 came from GPT-2.",
        f"pruned: {keep:,} of {whole:,} parameters are not zero, exactly; by magnitude over all attention and "
        "feed-forward matrices together. The embedding, which is also the output layer, is left alone.",
    ]
    left = [n for n in plan.groups if n > depth]
    if left:
        notes.append(
            f"n = {', '.join(map(str, left))} left out: the model has {depth} blocks, and a group of more is a group "
            f"of {depth}."
        )
    return made, tuple(notes)


def _merged(base: nn.Module, n: int, compress: bool) -> Made:
    return Made(merge_blocks(base, n, compress=compress))


def _pruned(base: nn.Module, keep: int) -> Made:
    model = copy.deepcopy(base)
    masks = prune_(model, recipe=global_magnitude, nonzero=keep)
    return Made(model, masks)


def _distilled(base: nn.Module, given: Given, plan: Plan, tell: Tell) -> nn.Module:
    """Every second block, taught by the whole model."""
    (blocks,) = (each.blocks for each in series(base))
    student: Any = drop_blocks(base, [block.path for block in blocks[1::2]])
    distill_(student, base, given.train, soft=0.5, hard=0.5, epochs=1, lr=plan.lr, seed=plan.seed, tell=tell)
    return student
