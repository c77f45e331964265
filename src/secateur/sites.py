"""Where a recipe's units compete: one site for every chosen layer, or for every axis that a pattern chooses."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from secateur.core.example import Example, analysis_of
from secateur.core.site import LayerSite, Site, look_of
from secateur.core.units import Analysis
from secateur.core.where import Layer, Only, select, unprunable
from secateur.errors import UsageError
from secateur.recipes import Recipe
from secateur.target import shape_of

__all__ = ["Sites", "sites_of"]


class Sites(NamedTuple):
    """What is pruned, and what is not.

    Args:
        sites: where units compete.
        layers: the matrices that scores look at.
        left_out: layers that are left as they are, each with the reason.
        axes_left_out: axes likewise.
        unprunable: matrices that are no parameters, likewise.
        analysis: of coupled units, None for patterns of one layer.
        example: that the analysis was made on.
    """

    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    left_out: tuple[tuple[Layer, str], ...]
    axes_left_out: tuple[tuple[str, str], ...] = ()
    unprunable: tuple[tuple[str, str], ...] = ()
    analysis: Analysis | None = None
    example: Example | None = None


def sites_of(
    model: nn.Module,
    recipe: Recipe,
    statistics: tuple[str, ...],
    only: Only = None,
    skip: Only = None,
    example: Any = None,
) -> Sites:
    """Find the sites of a recipe.

    Args:
        model: any module.
        recipe: its pattern cuts matrices (`pool`, `spread`), or axes (`sites`).
        statistics: what its score needs.
        only, skip: which layers; an axis is cut where every matrix that it runs through is among them.
        example: one input, or an `Analysis`; needed for axes.

    Raises:
        UsageError: nothing to prune, a pattern that does not fit a layer, no example for axes.
    """
    look = look_of(recipe.score, statistics)
    if not hasattr(recipe.pattern, "sites"):
        if look.about == "scales":
            raise UsageError(
                f"{recipe.describe()['score']} looks at the scales of batch norms, which belong to whole channels; "
                "choose pattern=Channels()"
            )
        if hasattr(recipe.update, "units_"):
            raise UsageError(
                f"{recipe.update!r} mends what whole units leave behind, and {recipe.pattern!r} cuts none; choose a "
                "pattern such as Neurons(), or another update"
            )
        selection = select(model, only, skip)
        sites = tuple(LayerSite(layer, recipe.pattern, shape_of(recipe, layer)) for layer in selection.chosen)
        return Sites(sites, selection.chosen, selection.left_out, unprunable=selection.unprunable)
    if recipe.update is not None and not hasattr(recipe.update, "units_"):
        raise UsageError(
            f"{recipe.update!r} updates single layers while it chooses, and {recipe.pattern!r} cuts through several; "
            "choose update=TakeOver(), or leave it out"
        )
    analysis, inputs = _analysis(model, recipe, example)
    barred, left_out, computed = _barred(model, only, skip)
    found, axes_left_out = recipe.pattern.sites(model, analysis, look, barred)
    layers = {layer.name: layer for site in found for layer in site.layers}
    return Sites(found, tuple(layers.values()), left_out, axes_left_out, computed, analysis, inputs)


def _analysis(model: nn.Module, recipe: Recipe, example: Any) -> tuple[Analysis, Example | None]:
    if isinstance(example, Analysis):
        return example, None
    if example is None:
        raise UsageError(
            f"{recipe.pattern!r} cuts coupled units, which are found by following one input through the model; "
            "pass example=, or data="
        )
    return analysis_of(model, example)


def _barred(model: nn.Module, only: Only, skip: Only) -> tuple[frozenset[str], Any, Any]:
    """Names of matrices that `only` and `skip` leave out, with the reasons; and those that are no parameters.

    What is left out by default is no obstacle to units.
    """
    if only is None and skip is None:
        return frozenset(), (), unprunable(model)
    selection = select(model, only, skip)
    out = tuple(
        (layer, why) for layer, why in selection.left_out if only is not None or why.startswith("skipped by")
    )
    return frozenset(name for layer, _ in out for name in (layer.name, *layer.tied)), out, selection.unprunable
