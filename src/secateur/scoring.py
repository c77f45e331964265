"""What the weights of a layer are worth: statistics by name, scores checked, units of earlier masks last."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.core.gradients import KNOWN, gather_all
from secateur.core.loss import Loss
from secateur.core.masks import Masks
from secateur.core.select import Candidates, last_of_all
from secateur.core.trained import TRAINED
from secateur.core.where import Layer
from secateur.errors import NumericError, UsageError, nearest
from secateur.target import shape_of

if TYPE_CHECKING:
    from secateur.prune import Plan

__all__ = ["candidates_of", "finite", "gather_for", "score_of", "seed_of", "statistics_of"]

# layer name -> statistic name -> (part, ...)
Statistics = Mapping[str, Mapping[str, Tensor]]


def statistics_of(score: Callable[..., Any]) -> tuple[str, ...]:
    """The parameter names of a score, after the weight, say what it needs to know."""
    try:
        names = tuple(inspect.signature(score).parameters)[1:]
    except (TypeError, ValueError):
        raise UsageError(f"score {score!r} is no function of (weight, <statistics by name>)") from None
    known = (*KNOWN, *TRAINED, "generator")
    for name in names:
        if name not in known:
            raise UsageError(
                f"score {getattr(score, '__name__', score)!r} asks for {name!r}, which is no known statistic; "
                f"{nearest(name, known)}"
            )
    return names


def gather_for(
    model: nn.Module, todo: Plan, data: Iterable[Any] | None, loss: Loss | None, given: Statistics
) -> Statistics:
    """What the score asks for, of every layer: as given, the rest from the data."""
    missing = [
        name
        for name in todo.statistics
        if name != "generator" and not all(name in given.get(layer.name, {}) for layer in todo.layers)
    ]
    score = todo.recipe.describe()["score"]
    for name in missing:
        if name in TRAINED:
            raise UsageError(
                f"{score} needs {name}, which is gathered while a model trains; use Gradual(..., optimizer=...)"
            )
    if not missing:
        return given
    if data is None:
        raise UsageError(f"{score} needs calibration data for {', '.join(missing)}; pass data=")
    found = gather_all(model, todo.layers, missing, data, loss)
    return {name: {**found[name], **given.get(name, {})} for name in found}


def candidates_of(
    todo: Plan,
    layer: Layer,
    statistics: Callable[[], Statistics],
    masks: Masks | None,
    seed: int,
    zeros_last: bool,
) -> Candidates:
    """The units of one layer, their scores computed when asked for.

    Args:
        masks: what these prune scores below everything.
        zeros_last: so does what is zero already.
    """
    part, out, columns = layer.layout.shape
    pattern = todo.recipe.pattern
    shape = shape_of(todo.recipe, layer)

    def scores() -> Tensor:
        matrices = layer.layout.to_matrices(layer.values).float()
        known = statistics().get(layer.name, {})
        inputs: dict[str, Any] = {name: values.to(matrices.device) for name, values in known.items()}
        if "generator" in todo.statistics:
            inputs["generator"] = [torch.Generator().manual_seed(seed_of(seed, layer.name))] * part
        scored = [
            score_of(todo, layer, matrices[p], {name: inputs[name][p] for name in todo.statistics})
            for p in range(part)
        ]
        whole = scored[0] if part == 1 else torch.cat(scored)
        units = pattern.pool(whole)
        if zeros_last:
            units = units.masked_fill(matrices.reshape(whole.shape) == 0, -float("inf"))
        if masks is not None and layer.name in masks:
            kept = layer.layout.to_matrices(masks[layer.name]).reshape(part * out, columns)
            if units.shape != kept.shape:  # a unit is pruned when all of its weights are
                kept = pattern.pool(kept.logical_not().float()) != 1
            units = last_of_all(units, kept.to(units.device))
        return units

    return Candidates(shape, layer.size // (shape[0] * shape[1]), scores)


def score_of(todo: Plan, layer: Layer, matrix: Tensor, given: dict[str, Any]) -> Tensor:
    """One matrix's scores; anybody may have written the score, so what it returns is checked."""
    result = todo.recipe.score(matrix, **given)
    if not isinstance(result, Tensor) or result.shape != matrix.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise UsageError(
            f"{layer.name}: score {todo.recipe.describe()['score']!r} is to return one number for each of the weights, "
            f"shape {tuple(matrix.shape)}, got {got}"
        )
    result = result.detach().float()
    if not finite(result):
        raise NumericError(f"{layer.name}: NaN or Inf among its scores; look at its weights and at the data")
    return result


def finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor Inf among them."""
    return all(bool(end.isfinite()) for end in values.aminmax())  # ten times faster than isfinite().all()


def seed_of(seed: int, name: str) -> int:
    """The seed of one layer, the same whatever else is pruned."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
