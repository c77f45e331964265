"""How the method of a request prunes: by one recipe, or by trying several and picking one."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from secateur.channels import permute_channels_
from secateur.core.gradients import KNOWN
from secateur.core.masks import Masks
from secateur.core.unit_masks import keep_of
from secateur.errors import NotPrunedWarning, UsageError
from secateur.measure import Tell
from secateur.prune import Plan, plan, prune_
from secateur.recipes import Recipe
from secateur.request import PruneRequest, build_recipe, cuts_units, pattern_of
from secateur.scoring import statistics_of

__all__ = ["Applied", "apply_", "intention", "needs_calibration", "planned"]


PLAIN = (
    "No --method was given: magnitude is the default for what is no causal language model. It looks at no data; with "
    "--data, sparsegpt and alps keep more of a model, see docs/results.md."
)


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


@contextmanager
def _listed() -> Iterator[None]:
    """No warning of what is not pruned: a plan's own list of it is shown, and written into the results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPrunedWarning)
        yield


@_listed()
def apply_(
    asked: PruneRequest,
    todo: Plan,
    model: nn.Module,
    data: Iterable[Any] | None,
    tell: Tell,
    masks: Masks | None = None,
    example: Any = None,
) -> Applied:
    """Prune a model in place by the method of a request.

    Args:
        asked: with its method settled.
        todo: the plan of that request.
        model: changed in place; on any error as before.
        data: calibration batches, None where the method needs none.
        tell: progress.
        masks: of an earlier pruning, which stays pruned.
        example: one input, where channels are to be put in order; default: the first batch of the data.

    Raises:
        UsageError, NumericError: see `prune_`, `best_` and `permute_channels_`.
    """
    if asked.permute:
        data = None if data is None else list(data)
        which: dict[str, Any] = {"only": list(asked.only) or None, "skip": list(asked.skip) or None}
        order = permute_channels_(model, todo.recipe, data, example=example, seed=asked.seed, **which)
        applied = apply_(asked.model_copy(update={"permute": False}), todo, model, data, tell, masks)
        return replace(applied, said=f"{applied.said}; {order}", notes=(*applied.notes, order.told))
    given: dict[str, Any] = {"nonzero": asked.nonzero, "data": data, "seed": asked.seed}
    if todo.analysis is not None:
        return _units(asked, todo, model, given, masks)
    given |= {"only": list(asked.only) or None, "skip": list(asked.skip) or None}
    if asked.method == "best":
        if masks:
            raise UsageError("method best starts from a model that nothing was pruned of; name another method")
        return _best(asked, todo, model, given, tell)
    found = prune_(model, asked.sparsity, todo.recipe, masks=masks, **given)
    return Applied(found, todo.recipe, str(todo.recipe))


def _units(
    asked: PruneRequest, todo: Plan, model: nn.Module, given: dict[str, Any], masks: Masks | None
) -> Applied:
    """Whole units; the analysis of the plan serves again, unless times are measured on its example."""
    assert todo.analysis is not None
    timed = todo.target is not None and todo.target.quantity == "ms"
    example: Any = todo.example if timed else todo.analysis
    chosen = {"only": list(asked.only) or None, "skip": list(asked.skip) or None}
    given |= {"target": todo.target, "example": example, "masks": masks, **chosen}
    found = prune_(model, asked.sparsity, todo.recipe, **given)
    keep = keep_of(todo.analysis, found)
    left = {site.name: (len(keep.get(site.name, range(site.shape[1]))), site.shape[1]) for site in todo.sites}
    kinds: dict[str, tuple[int, int]] = {}
    for name, (kept, size) in left.items():
        kind = todo.analysis[name].kind
        before = kinds.get(kind, (0, 0))
        kinds[kind] = (before[0] + size - kept, before[1] + size)
    gone = ", ".join(f"{out:,} of {of:,} units of kind {kind}" for kind, (out, of) in kinds.items())
    details = {"units left": {name: list(pair) for name, pair in left.items()}}
    notes = (f"Taken out: {gone}.", *_unmended(todo.recipe, model, found))
    return Applied(found, todo.recipe, str(todo.recipe), details, notes)


def _unmended(recipe: Recipe, model: nn.Module, masks: Masks) -> tuple[str, ...]:
    """What is to be known of an update that had nowhere to put what units did, as in front of batch norms."""
    idle = getattr(recipe.update, "idle", None)
    if idle is None:
        return ()
    without, count = idle(model, masks)
    if not without:
        return ()
    return (
        f"Mending by biases: {len(without)} of {count} layers that lost inputs have no bias to take their means, "
        f"{without[0]} first, and stay as they were; --mend least-squares refits their weights.",
    )


def needs_calibration(recipe: Recipe) -> bool:
    """Whether a recipe asks for data."""
    return recipe.update is not None or any(name in KNOWN for name in statistics_of(recipe.score))


def planned(asked: PruneRequest, model: nn.Module, example: Any = None) -> Plan:
    """The plan of a request whose method is settled.

    Args:
        asked: the request.
        model: not changed.
        example: one input, for whole units.

    Raises:
        UsageError: see `plan`; no example where one is needed.
    """
    if cuts_units(asked) and example is None:
        raise UsageError(
            "whole units are found by following one input through the model, and no input is known; give --data or "
            "--labelled file.py:function, or a model function that returns (model, example)"
        )
    return plan(
        model,
        asked.sparsity,
        build_recipe(asked),
        nonzero=asked.nonzero,
        target=asked.target,
        only=list(asked.only) or None,
        skip=list(asked.skip) or None,
        example=example,
    )


def _best(asked: PruneRequest, todo: Plan, model: nn.Module, given: dict[str, Any], tell: Tell) -> Applied:
    from secateur.best import best_

    found = best_(
        model, asked.sparsity, pattern=todo.recipe.pattern, evolution=asked.evolution, tell=tell, **given
    )
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


def _crossing(todo: Plan) -> tuple[str, ...]:
    """Where axes cross, a sparsity of what competes is no share of the parameters."""
    times = Counter(name for site in todo.sites for name in site.parameters)
    if todo.sparsity is None or max(times.values()) < 2:
        return ()
    return (
        f"Axes cross, and a weight counts on each that it lies on: at sparsity {todo.sparsity:g} of these weights more "
        f"than {todo.sparsity:.0%} of the parameters may go; --target says what is to be left, as in "
        f"'{1 - todo.sparsity:.2g} parameters'.",
    )


def intention(asked: PruneRequest, typed: PruneRequest, todo: Plan) -> tuple[str, ...]:
    """What a reader of the plan needs to know of the method beyond the recipe.

    Args:
        asked: with its method settled.
        typed: as it was given.
        todo: the plan.
    """
    if cuts_units(asked):
        return (*_of_units(asked, typed), *_crossing(todo))
    if asked.method != "best":
        default = typed.method is None and asked.method == "magnitude"
        return (PLAIN,) if default else ()
    tries = (
        "Method best starts at this recipe, tries shares that differ by depth where the pattern leaves a choice, "
        "reconstructs attention and feed-forward of every block, and keeps of it what lowers the divergence from "
        "the dense model on held-out calibration data. It takes many times as long as alps."
    )
    if typed.method is not None:
        return (tries,)
    return (
        "No --method was given: best is the default for causal language models, magnitude for others.",
        tries,
    )


def _of_units(asked: PruneRequest, typed: PruneRequest) -> tuple[str, ...]:
    notes = []
    if typed.method is None:
        notes.append(f"No --method was given: {asked.method} is the default for whole units.")
    if asked.method in ("magnitude", "global-magnitude", "l2") and "channels" not in pattern_of(asked):
        notes.append(
            "The size of weights is a poor judge of heads and neurons, worse than chance on some language models; "
            "flap, gate and taylor look at data, see docs/results.md."
        )
    return tuple(notes)
