"""How much is asked for: a sparsity or a number of non-zeros becomes one integer, the weights that are kept."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import nn

from secateur.core.counts import distinct_parameters
from secateur.core.site import Site
from secateur.core.where import Layer
from secateur.errors import UsageError, nearest
from secateur.recipes import METHODS, Recipe

__all__ = ["check_arguments", "check_recipe", "shape_of", "weights_to_keep"]


def check_recipe(recipe: Any) -> None:
    """A name, a pattern or a score is none."""
    if not isinstance(recipe, Recipe):
        known = f"; {nearest(recipe, METHODS)}" if isinstance(recipe, str) else ""
        raise UsageError(f"recipe is {recipe!r}; expected a Recipe such as secateur.wanda{known}")


def check_arguments(sparsity: Any, recipe: Any, nonzero: Any) -> None:
    """The slips that types cannot catch: a recipe for a sparsity, a name for a recipe, half a parameter."""
    check_recipe(recipe)
    if sparsity is not None and not isinstance(sparsity, Real):
        what = "a recipe, which goes to recipe=" if isinstance(sparsity, Recipe) else repr(sparsity)
        raise UsageError(f"sparsity is {what}; expected a number in [0, 1]")
    if nonzero is not None and not (isinstance(nonzero, Real) and float(nonzero).is_integer()):
        raise UsageError(f"nonzero is {nonzero!r}; expected a whole number of parameters")


def weights_to_keep(
    model: nn.Module, sites: tuple[Site, ...], recipe: Recipe, sparsity: float | None, nonzero: int | None
) -> int | None:
    """The target as an integer: weights kept in all sites together; None when the recipe decides."""
    size = sum(site.shape[0] * site.shape[1] * site.cells for site in sites)
    decides = recipe.fixed_by_pattern or getattr(recipe.allocate, "decides", False)
    if nonzero is not None:
        if sparsity is not None or decides:
            raise UsageError(
                "nonzero fixes the count; give it without a sparsity and with a recipe that can follow it"
            )
        return _keep_of_nonzero(model, sites, recipe, nonzero)
    if recipe.fixed_by_pattern:
        own = recipe.pattern.sparsity
        if sparsity is not None and abs(sparsity - own) > 1e-9:
            raise UsageError(
                f"{recipe.pattern} fixes the sparsity at {own:g}, got {sparsity:g}; leave the sparsity out"
            )
        return size - round(size * own)
    if decides:
        if sparsity is not None:
            raise UsageError(
                f"{recipe.allocate!r} decides how much is cut, got sparsity {sparsity:g} as well; leave it out"
            )
        return None
    if sparsity is None:
        raise UsageError("no sparsity given; say how many of the weights are to become zero, e.g. 0.5")
    if not 0 <= sparsity <= 1:
        hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity <= 100 else ""
        raise UsageError(f"sparsity {sparsity:g} is not in [0, 1].{hint}")
    return size - round(size * float(sparsity))


def _keep_of_nonzero(model: nn.Module, sites: tuple[Site, ...], recipe: Recipe, nonzero: int) -> int:
    layers = [layer for site in sites for layer in site.layers]
    if hasattr(recipe.pattern, "sites") or any(site.cells != 1 for site in sites):
        raise UsageError(f"an exact number of non-zeros needs single weights as units, got {recipe.pattern}")
    chosen = {name for layer in layers for name in (layer.name, *layer.tied)}
    others = sum(int(torch.count_nonzero(p)) for n, p in distinct_parameters(model).items() if n not in chosen)
    own = sum(int(torch.count_nonzero(layer.weight)) for layer in layers)
    if not others <= nonzero <= others + own:
        raise UsageError(
            f"{nonzero:,} non-zero parameters cannot be reached: the chosen layers hold {own:,} of the model's "
            f"{others + own:,}, so {others:,} to {others + own:,} are possible. Choose other layers or another "
            "number"
        )
    return int(nonzero) - others


def shape_of(recipe: Recipe, layer: Layer) -> tuple[int, int]:
    """`(competition, unit)` of a layer; patterns are tried on a tensor without storage."""
    part, out, columns = layer.layout.shape
    place = layer.path or layer.name
    if not layer.size:
        raise UsageError(
            f'{place}: shape {tuple(layer.weight.shape)} holds no weight. Skip it with skip="{place}"'
        )
    try:
        pooled = recipe.pattern.pool(torch.empty(part * out, columns, device="meta"))
    except UsageError as error:
        raise UsageError(f'{place}: {error}. Skip it with skip="{place}" or choose another pattern') from None
    return pooled.shape[0], pooled.shape[1]
