"""How the method of a request prunes: by one recipe, or by trying several and picking one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from secateur.core.masks import Masks
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.prune import Plan, prune_
from secateur.recipes import Recipe
from secateur.request import PruneRequest

__all__ = ["Applied", "apply_", "intention"]


@dataclass(frozen=True)
class Applied:
    """What a method did.

    Attributes:
        masks: kept weights, True = kept.
        recipe: the recipe in force; of a method that tries several, the one that it picked.
        said: the whole of it in one line.
        details: what a recipe does not say, for `recipe.resolved.yaml`.
        notes: sentences for the reader of the results.
    """

    masks: Masks
    recipe: Recipe
    said: str
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def apply_(
    asked: PruneRequest,
    todo: Plan,
    model: nn.Module,
    data: Iterable[Any] | None,
    tell: Tell,
    masks: Masks | None = None,
) -> Applied:
    """Prune a model in place by the method of a request.

    Args:
        asked: with its method settled.
        todo: the plan of that request.
        model: changed in place; on any error as before.
        data: calibration batches, None where the method needs none.
        tell: progress.
        masks: of an earlier pruning, which stays pruned.

    Raises:
        UsageError, NumericError: see `prune_` and `best_`.
    """
    given: dict[str, Any] = {"nonzero": asked.nonzero, "data": data, "seed": asked.seed}
    given |= {"only": list(asked.only) or None, "skip": list(asked.skip) or None}
    if asked.method == "best":
        if masks:
            raise UsageError("method best starts from a model that nothing was pruned of; name another method")
        return _best(asked, todo, model, given, tell)
    found = prune_(model, asked.sparsity, todo.recipe, masks=masks, **given)
    return Applied(found, todo.recipe, str(todo.recipe))


def _best(asked: PruneRequest, todo: Plan, model: nn.Module, given: dict[str, Any], tell: Tell) -> Applied:
    from secateur.best import best_

    found = best_(model, asked.sparsity, pattern=todo.recipe.pattern, tell=tell, **given)
    details = {
        "reconstructed": found.reconstructed,
        "tried": [
            {"name": step.name, "divergence": step.divergence, "taken": step.taken} for step in found.steps
        ],
    }
    tried = "; ".join(f"{step.name} {step.divergence:.4f}" for step in found.steps)
    note = (
        f"Method best picked {found.picked}. Tried, with the divergence from the dense model on held-out calibration "
        f"data in nats a token: {tried}."
    )
    return Applied(found.masks, found.recipe, f"best: {found.picked}", details, (note,))


def intention(asked: PruneRequest, typed: PruneRequest) -> tuple[str, ...]:
    """What a reader of the plan needs to know of the method beyond the recipe.

    Args:
        asked: with its method settled.
        typed: as it was given.
    """
    if asked.method != "best":
        return ()
    tries = (
        "Method best starts at this recipe, tries shares that differ by depth where the pattern leaves a choice, "
        "reconstructs attention and feed-forward of every block, and keeps of it what lowers the divergence from "
        "the dense model on held-out calibration data. It takes a few times as long as alps."
    )
    if typed.method is not None:
        return (tries,)
    return (
        "No --method was given: best is the default for causal language models, magnitude for others.",
        tries,
    )
