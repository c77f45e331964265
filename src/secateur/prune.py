"""prune_: the one loop that joins score, pattern and allocator; plan: what it would do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from secateur.checks import (
    bias_name,
    check_masks,
    check_nonzero,
    check_stays_pruned,
    check_total,
    check_weights,
)
from secateur.core.example import Example
from secateur.core.forward import uncompiled, unwrapped
from secateur.core.gradients import GRADIENTS, gather_all
from secateur.core.loss import Loss
from secateur.core.masks import Masks, check_apart, named_parameters
from secateur.core.select import Candidates
from secateur.core.site import Site
from secateur.core.statistics import STATISTICS
from secateur.core.units import Analysis
from secateur.core.where import Layer, Only, layers
from secateur.errors import NotPrunedWarning, UsageError
from secateur.mend import mend_, own_biases, update_statistics
from secateur.recipes import Recipe, magnitude
from secateur.scoring import (
    Statistics,
    candidates_of,
    gather_for,
    last_already,
    mask_of,
    score_of,
    seed_of,
    statistics_of,
)
from secateur.sites import sites_of
from secateur.structured import Target, counts_of
from secateur.target import check_arguments, weights_to_keep

__all__ = ["Plan", "plan", "prune_"]


@dataclass(frozen=True)
class Plan:
    """What a call of `prune_` would do, found without looking at a score.

    Attributes:
        recipe: score, pattern and allocator.
        layers: the matrices that are pruned or, where coupled units are, that the score looks at.
        left_out: layers that are not pruned, each with the reason.
        keep: weights kept in all sites together; None when the allocator or a target in real units decides.
        statistics: what the calibration data must say about each layer.
        sites: where units compete: one for each layer, or for each axis of coupled units.
        axes_left_out: axes of the right kind that are not pruned, each with the reason.
        unprunable: matrices that are no parameters (weight norm), each with the reason; `prune_` warns of them.
        target: in real units, None where a sparsity or a number of non-zeros was asked for.
        analysis: the axes of the model, None where layers are pruned.
        example: what it was made on.
        touched: the matrices that lose something; of coupled units more than the score looks at.
    """

    recipe: Recipe
    layers: tuple[Layer, ...]
    left_out: tuple[tuple[Layer, str], ...]
    keep: int | None
    statistics: tuple[str, ...]
    sites: tuple[Site, ...]
    axes_left_out: tuple[tuple[str, str], ...] = ()
    unprunable: tuple[tuple[str, str], ...] = ()
    target: Target | None = None
    analysis: Analysis | None = None
    example: Example | None = None
    touched: tuple[Layer, ...] = ()

    @property
    def size(self) -> int:
        """Weights in all units; where axes cross, a weight counts on each."""
        return sum(site.shape[0] * site.shape[1] * site.cells for site in self.sites)

    @property
    def sparsity(self) -> float | None:
        """The zeros asked for, as a fraction of `size`; None when the allocator or a target decides."""
        return None if self.keep is None else 1 - self.keep / self.size

    def __str__(self) -> str:
        if self.target is not None:
            how = f"to {self.target}"
        elif self.sparsity is None:
            how = "as much as the threshold says"
        else:
            how = f"to sparsity {self.sparsity:.4f}"
        units = ""
        if self.analysis is not None:
            units = f" in {sum(site.shape[1] for site in self.sites):,} units"
            how += " of these weights" if self.sparsity is not None else ""
        noun = self.sites[0].noun[len(self.sites) > 1]
        return f"{self.recipe}: {len(self.sites)} {noun} with {self.size:,} weights{units} {how}"


def plan(
    model: nn.Module,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    nonzero: int | None = None,
    target: str | Target | None = None,
    only: Only = None,
    skip: Only = None,
    example: Any = None,
) -> Plan:
    """Resolve what `prune_` with the same arguments would prune, and check everything that needs no data.

    Raises:
        UsageError: a sparsity out of range, a pattern that does not fit a layer, nothing to prune, a tied
            tensor, elements that share memory, an unknown statistic, a target that is not understood.
    """
    model = unwrapped(model)
    check_arguments(sparsity, recipe, nonzero)
    wanted = Target.read(target, recipe, sparsity, nonzero)
    statistics = statistics_of(recipe.score)
    found = sites_of(model, recipe, statistics, only, skip, example)
    update_statistics(recipe)
    keep = None if wanted else weights_to_keep(model, found.sites, recipe, sparsity, nonzero)
    names = {name for site in found.sites for name in site.parameters}
    parameters = named_parameters(model)
    for name in sorted(names):
        check_apart(name, parameters[name])
    touched = found.layers
    if found.analysis is not None:
        touched = tuple(layer for layer in layers(model) if names & {layer.name, *layer.tied})
    return Plan(
        recipe, found.layers, found.left_out, keep, statistics, found.sites, found.axes_left_out, found.unprunable,
        wanted, found.analysis, found.example, touched,
    )  # fmt: skip


@uncompiled()
def prune_(
    model: nn.Module,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    nonzero: int | None = None,
    target: str | Target | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    example: Any = None,
    only: Only = None,
    skip: Only = None,
    masks: Masks | None = None,
    statistics: Statistics | None = None,
    keep_originals: bool = False,
    seed: int = 0,
) -> Masks:
    """Prune a model in place: its weights get the zeros, the masks that are returned say where.

    Args:
        model: any `nn.Module`.
        sparsity: zeros to reach, as a fraction of the weights of the chosen layers, or of all coupled units
            that compete, in [0, 1]. Omit it with a recipe that decides for itself (threshold, percentile, N:M).
        recipe: score, pattern and allocator.
        nonzero: instead of a sparsity, the exact number of non-zero parameters that the whole model is to have.
        target: instead of a sparsity, what the model without the pruned units is to need: "0.5 parameters",
            "300M macs", "20 MB", "2x faster", "12 ms"; see `Target`. For patterns of coupled units.
        data: calibration batches, for scores that need activations or gradients; see `core.statistics.gather`.
        loss: `loss(output, target)`, for scores that need gradients; default: what the batches imply (labels, the
            next token), see `core.loss.loss_of`.
        example: for patterns of coupled units, one input to follow through the model (or an `Analysis`);
            default: the first batch of the data.
        only, skip: which layers; a role (`all`, `attention`, `ffn`, `encoder`, `decoder`, `head`), a glob over
            module paths, a module type, a predicate `(path, module) -> bool`, or a list of these. The
            default is every layer but embeddings, routers and the vocabulary head of language models, or
            every axis that the pattern chooses.
        masks: masks of an earlier call: what they prune stays pruned and counts towards the sparsity.
        statistics: what is known already of each layer, by parameter name and statistic, `(part, out, in)` or
            `(part, in)`; only what is missing is gathered from the data.
        keep_originals: keep a copy of the weights in the masks, so that `undo_` can put them back.
        seed: for random scores.

    Returns:
        One mask for each pruned parameter, True = kept; of coupled units for every parameter that carries them. Names
        are those of the model inside of DataParallel, DistributedDataParallel and `torch.compile`.

    Raises:
        UsageError: see `plan`; also missing data, or a target that cannot be reached.
        NumericError: NaN or Inf in weights, activations or scores, naming the layer.

    Warns:
        NotPrunedWarning: matrices that are no parameters (weight norm, spectral norm, `torch.nn.utils.prune`, integers)
            stay as they are; named in `skip` they do without a word.

    Cost: one forward pass of the data if the score needs them (and a backward pass for gradients); scores are
        computed a layer at a time, once where counts do not depend on them, three times for `globally`; extra memory
        one layer's scores and one byte a weight for the masks. Coupled units: an export of the model besides.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> prune_(model, 0.5)
        Masks(2 parameters, 48 of 96 pruned, sparsity 0.5000)
    """
    model = unwrapped(model)
    check_arguments(sparsity, recipe, nonzero)
    example, data = _example(recipe, example, data)
    todo = plan(model, sparsity, recipe, nonzero=nonzero, target=target, only=only, skip=skip, example=example)
    if todo.unprunable:
        warnings.warn(_left_dense(todo.unprunable), NotPrunedWarning, stacklevel=3)
    sites = {site.name: site for site in todo.sites}
    parameters = named_parameters(model)
    check_masks(masks, todo.sites, parameters)
    check_weights(todo.layers)
    whole = hasattr(recipe.update, "units_")  # mends when all units are chosen
    if recipe.update is not None:
        data = _for_update(recipe, data, masks)
    known = cache(lambda: gather_for(model, recipe, todo.layers, data, loss, statistics))
    first = None if last_already(recipe, sites.values(), masks) else masks
    candidates = {
        name: candidates_of(recipe, site, known, first, seed, zeros_last=nonzero is not None)
        for name, site in sites.items()
    }
    if recipe.update is None or whole:
        known()  # what is wrong with the data is said before anything else
    counts = counts_of(model, todo, candidates)
    check_total(todo, candidates, counts)
    if recipe.update is not None and not whole:
        return _mended(model, todo, counts, data or (), loss, seed, keep_originals, nonzero)
    kept = _kept(todo.sites, candidates, counts)
    check_stays_pruned(kept, masks)
    if nonzero is not None:
        check_nonzero(parameters, kept, nonzero)
    if whole:
        return _mended_units(model, recipe, Masks(kept), data or (), keep_originals)
    originals = {name: parameters[name].detach().clone() for name in kept} if keep_originals else None
    result = Masks(kept, originals)
    result.apply_(model)
    return result


def _kept(
    sites: Iterable[Site], candidates: Mapping[str, Candidates], counts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One mask for each parameter: where axes cross, what all of them keep."""
    kept: dict[str, Tensor] = {}
    for site in sites:
        for parameter, mask in mask_of(site, candidates[site.name], counts[site.name]).items():
            kept[parameter] = kept[parameter] & mask if parameter in kept else mask
    return kept


def _left_dense(unprunable: tuple[tuple[str, str], ...]) -> str:
    """Which matrices nobody left out and nothing prunes, by reason, and what to do."""
    names: dict[str, list[str]] = {}
    for name, reason in unprunable:
        names.setdefault(reason, []).append(name)
    listed = [
        f"{', '.join(found[:5])}{f' and {len(found) - 5} more' if len(found) > 5 else ''}: {reason}"
        for reason, found in names.items()
    ]
    return f"not pruned: {'; '.join(listed)}; or name what is to stay in skip="


def _example(recipe: Recipe, example: Any, data: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """Where units are coupled, the first batch of the data is the example if none is given."""
    if example is not None or data is None or not hasattr(recipe.pattern, "sites") or isinstance(data, Mapping):
        return example, data
    batches = iter(data)
    first = next(batches, None)
    return first, data if isinstance(data, list | tuple) or first is None else chain([first], batches)


def _for_update(recipe: Recipe, data: Iterable[Any] | None, masks: Masks | None) -> list[Any]:
    """The data as a list, because an allocator or a score may want to look at them before the update does."""
    if masks is not None:
        raise UsageError(
            f"{recipe.update!r} finds its own masks and cannot start from earlier ones; leave masks out"
        )
    if data is None:
        names = ", ".join(update_statistics(recipe))
        raise UsageError(f"{recipe.update!r} needs calibration data{names and ' for '}{names}; pass data=")
    return list(data)


def _mended_units(
    model: nn.Module, recipe: Recipe, masks: Masks, data: Iterable[Any], keep_originals: bool
) -> Masks:
    """Apply masks of whole units and mend what reads them, biases too."""
    if not masks.zeros:
        return masks
    before = named_parameters(model)
    held = {name: p.detach().clone() for name, p in before.items()} if keep_originals else {}
    recipe.update.units_(model, masks, data)
    changed = {name: old for name, old in held.items() if name in masks or not torch.equal(old, before[name])}
    return Masks(dict(masks), changed)


def _mended(
    model: nn.Module,
    todo: Plan,
    counts: Mapping[str, Tensor],
    data: Iterable[Any],
    loss: Loss | None,
    seed: int,
    keep_originals: bool,
    nonzero: int | None,
) -> Masks:
    """Prune and update while the data flow; on any error the weights are as they were."""
    mine = {layer.name: layer for layer in todo.layers}
    changed: dict[str, Tensor] = {name: layer.weight for name, layer in mine.items()}
    changed |= {bias_name(mine[name]): bias for name, bias in own_biases(model, todo.layers).items()}
    originals = {name: parameter.detach().clone() for name, parameter in changed.items()}
    names = [name for name in {*todo.statistics, *update_statistics(todo.recipe)} if name in STATISTICS]
    slopes = [name for name in todo.statistics if name in GRADIENTS]  # of the dense model: the stream has none
    dense = gather_all(model, todo.layers, slopes, data, loss) if slopes else {}

    def scores(layer: Layer, part: int, known: Mapping[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {name: known[name] for name in todo.statistics if name in known}
        given |= {name: dense[layer.name][name][part] for name in slopes}
        if "generator" in todo.statistics:
            given["generator"] = torch.Generator().manual_seed(seed_of(seed, f"{layer.name}:{part}"))
        matrix = layer.layout.to_matrices(layer.values)[part].float()
        return score_of(todo.recipe, layer, matrix, given)

    try:
        kept = mend_(model, todo.layers, todo.recipe, counts, names, data, scores).masks
        if nonzero is not None:
            check_nonzero({name: layer.weight for name, layer in mine.items()}, kept, nonzero)
    except BaseException:
        with torch.no_grad():
            for name, parameter in changed.items():
                parameter.copy_(originals[name])
        raise
    return Masks({name: kept[name] for name in mine}, originals if keep_originals else None)
