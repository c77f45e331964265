"""From scores to units: a recipe's score asked of every layer, pooled where units compete, and spread into masks."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.gradients import KNOWN, gather_all
from secateur.core.loss import Loss
from secateur.core.select import Candidates, all_but_smallest, last_of_all, smallest
from secateur.core.site import LayerSite, Scored, Site, look_of
from secateur.core.trained import TRAINED
from secateur.core.where import Layer
from secateur.errors import NumericError, UsageError, nearest
from secateur.recipes import Recipe, magnitude

__all__ = [
    "Statistics",
    "candidates_of",
    "finite",
    "gather_for",
    "kept_of",
    "last_already",
    "mask_of",
    "score_of",
    "scored",
    "seed_of",
    "statistics_of",
]

# layer name -> statistic name -> (part, ...)
Statistics = Mapping[str, Mapping[str, Tensor]]

FEW = 1 << 20  # units whose scores are kept between passes: 4 MB


def statistics_of(score: Callable[..., Any]) -> tuple[str, ...]:
    """The parameter names of a score, after the weight, say what it needs to know.

    Raises:
        UsageError: a score that is no function, or a name that is no statistic.
    """
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
    model: nn.Module,
    recipe: Recipe,
    layers: Sequence[Layer],
    data: Iterable[Any] | None,
    loss: Loss | None = None,
    given: Statistics | None = None,
) -> Statistics:
    """What the recipe's score asks for, of every layer that it looks at: as given, the rest from the data."""
    given = given or {}
    missing = [
        name
        for name in statistics_of(recipe.score)
        if name != "generator" and not all(name in given.get(layer.name, {}) for layer in layers)
    ]
    score = recipe.describe()["score"]
    for name in missing:
        if name in TRAINED:
            raise UsageError(
                f"{score} needs {name}, which is gathered while a model trains; use Gradual(..., optimizer=...)"
            )
    if not missing:
        return given
    if data is None:
        raise UsageError(f"{score} needs calibration data for {', '.join(missing)}; pass data=")
    found = gather_all(model, layers, missing, data, loss)
    return {name: {**found[name], **given.get(name, {})} for name in found}


def candidates_of(
    recipe: Recipe,
    site: Site,
    statistics: Callable[[], Statistics],
    masks: Mapping[str, Tensor] | None,
    seed: int,
    zeros_last: bool,
    around: Callable[[Layer], AbstractContextManager[Any]] = nullcontext,
) -> Candidates:
    """The units of one site, their scores computed when asked for.

    Args:
        recipe: its score.
        site: where the units compete.
        statistics: layer name -> statistic -> values, asked for when scores are.
        masks: what earlier masks prune goes first.
        seed: of random scores.
        zeros_last: weights that are zero already go first.
        around: entered while a layer is scored, such as to give it its weight.
    """
    names = statistics_of(recipe.score)

    def one(layer: Layer) -> Scored:
        with around(layer):
            return scored(recipe, layer, names, statistics().get(layer.name, {}), seed)

    def scores() -> Tensor:
        units = site.pool(one)
        if zeros_last:
            units = _gone(units, site.pruned({layer.name: layer.values != 0 for layer in site.layers}))
        if masks:
            units = _gone(units, site.pruned(masks))
        return _protected(units, site.least)

    if isinstance(site, LayerSite):  # a layer's scores may be streamed
        plain = recipe.score is magnitude.score and site.cells == 1 and not masks and not zeros_last
        return Candidates(site.shape, site.cells, scores, magnitudes=site.weights if plain else None)
    few = site.shape[0] * site.shape[1] <= FEW
    return Candidates(
        site.shape, site.cells, cache(scores) if few else scores, site.least, site.step, site.alike
    )


def last_already(recipe: Recipe, sites: Iterable[Site], masks: Mapping[str, Tensor] | None) -> bool:
    """Whether what the masks prune is what is zero, everywhere: then magnitudes alone put it before all else.

    So it is while zeros are held, and nobody need write scores out to mark what goes first.
    """
    if not masks or recipe.score is not magnitude.score:
        return False
    for site in sites:
        if not isinstance(site, LayerSite) or site.cells != 1:
            return False
        alive = site.layer.values != 0
        mask = masks.get(site.name)
        if not (bool(alive.all()) if mask is None else torch.equal(alive, mask.to(alive.device))):
            return False
    return True


def _gone(units: Tensor, gone: Tensor | None) -> Tensor:
    return units if gone is None else last_of_all(units, gone.to(units.device).logical_not_())


def _protected(units: Tensor, least: int) -> Tensor:
    """The best of every competition cannot be cut: their score is infinite."""
    if not least:
        return units
    ranked = smallest(units, torch.full((units.shape[0],), max(0, units.shape[1] - least)))
    return units.masked_fill(~ranked, float("inf"))


def scored(
    recipe: Recipe, layer: Layer, names: tuple[str, ...], known: Mapping[str, Tensor], seed: int
) -> Scored:
    """What the recipe's score says of all parts of a layer."""
    matrices = layer.layout.to_matrices(layer.values).float()
    part = matrices.shape[0]
    inputs: dict[str, Any] = {name: values.to(matrices.device) for name, values in known.items()}
    if "generator" in names:
        inputs["generator"] = [torch.Generator().manual_seed(seed_of(seed, layer.name))] * part
    said = [
        score_of(recipe, layer, matrices[p], {name: inputs[name][p] for name in names}) for p in range(part)
    ]
    return Scored(said[0][None] if part == 1 else torch.stack(said), look_of(recipe.score, names))


def score_of(recipe: Recipe, layer: Layer, matrix: Tensor, given: dict[str, Any]) -> Tensor:
    """One matrix's scores; anybody may have written the score, so what it returns is checked."""
    result = recipe.score(matrix, **given)
    about = look_of(recipe.score, ()).about
    shape = tuple(result.shape) if isinstance(result, Tensor) else ()
    fits = shape == tuple(matrix.shape) or (
        about == "inputs" and len(shape) == 2 and shape[1] == matrix.shape[1]
    )
    if not fits:
        wanted = f"one number for each of the weights, shape {tuple(matrix.shape)}"
        if about == "inputs":
            wanted = f"rows of one number for each input column, shape (rows, {matrix.shape[1]})"
        got = shape if isinstance(result, Tensor) else type(result).__name__
        raise UsageError(f"{layer.name}: score {recipe.describe()['score']!r} is to return {wanted}, got {got}")
    result = result.detach().float()
    if not finite(result):
        raise NumericError(f"{layer.name}: NaN or Inf among its scores; look at its weights and at the data")
    return result


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(end.isfinite()) for end in values.aminmax())  # ten times faster than isfinite().all()


def seed_of(seed: int, name: str) -> int:
    """A seed for one layer, independent of the order of the layers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def mask_of(site: Site, candidates: Candidates, counts: Tensor) -> Mapping[str, Tensor]:
    """The masks of a site's parameters from how many units each of its competitions keeps."""
    return site.spread(kept_of(candidates, counts))


def kept_of(candidates: Candidates, counts: Tensor) -> Tensor:
    """The units that stay, `(competition, unit)`: those of the highest scores, ties by position."""
    keys, competing = candidates.keys(), candidates.shape[1]
    if len(counts) == 1:  # the whole layer is one competition
        keys, competing = keys.reshape(1, -1), candidates.units
    kept = all_but_smallest(keys, competing - counts, guess=candidates.guess.value)
    return kept.reshape(candidates.shape)
