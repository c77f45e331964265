"""prune_: the one loop that joins score, pattern and allocator; plan: what it would do."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.gradients import GRADIENTS, KNOWN, gather_all
from secateur.core.loss import Loss
from secateur.core.masks import Masks, check_fits
from secateur.core.select import Candidates, smallest
from secateur.core.statistics import STATISTICS
from secateur.core.where import Layer, Only, select
from secateur.errors import NumericError, UsageError, nearest
from secateur.mend import mend_, own_biases, update_statistics
from secateur.recipes import Recipe, magnitude
from secateur.target import check_arguments, shape_of, weights_to_keep

__all__ = ["Plan", "plan", "prune_"]


@dataclass(frozen=True)
class Plan:
    """What a call of `prune_` would do, found without looking at a score.

    Attributes:
        layers: the layers that would be pruned.
        left_out: layers that would not, each with the reason.
        keep: weights kept in all layers together; None when the allocator decides (a threshold).
        statistics: what the calibration data must say about each layer's input.
    """

    recipe: Recipe
    layers: tuple[Layer, ...]
    left_out: tuple[tuple[Layer, str], ...]
    keep: int | None
    statistics: tuple[str, ...]

    @property
    def size(self) -> int:
        """Weights in all layers that would be pruned."""
        return sum(layer.size for layer in self.layers)

    @property
    def sparsity(self) -> float | None:
        """The zeros asked for, as a fraction of `size`; None when the allocator decides."""
        return None if self.keep is None else 1 - self.keep / self.size

    def __str__(self) -> str:
        target = (
            "as much as the threshold says" if self.sparsity is None else f"to sparsity {self.sparsity:.4f}"
        )
        return f"{self.recipe}: {len(self.layers)} layers with {self.size:,} weights {target}"


def plan(
    model: nn.Module,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    nonzero: int | None = None,
    only: Only = None,
    skip: Only = None,
) -> Plan:
    """Resolve what `prune_` with the same arguments would prune, and check everything that needs no data.

    Raises:
        UsageError: a sparsity out of range, a pattern that does not fit a layer, nothing to prune, a tied
            tensor, an unknown statistic.
    """
    check_arguments(sparsity, recipe, nonzero)
    selection = select(model, only, skip)
    for layer in selection.chosen:
        shape_of(recipe, layer)
    update_statistics(recipe)
    keep = weights_to_keep(model, selection.chosen, recipe, sparsity, nonzero)
    return Plan(recipe, selection.chosen, selection.left_out, keep, _statistics_of(recipe.score))


def prune_(
    model: nn.Module,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    nonzero: int | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    only: Only = None,
    skip: Only = None,
    masks: Masks | None = None,
    keep_originals: bool = False,
    seed: int = 0,
) -> Masks:
    """Prune a model in place: its weights get the zeros, the masks that are returned say where.

    Args:
        model: any `nn.Module`.
        sparsity: zeros to reach, as a fraction of the chosen layers' weights, in [0, 1]. Omit it with a recipe
            that decides for itself (threshold, percentile, N:M).
        recipe: score, pattern and allocator.
        nonzero: instead of a sparsity, the exact number of non-zero parameters that the whole model is to have.
        data: calibration batches, for scores that need activations or gradients; see `core.statistics.gather`.
        loss: `loss(output, target)`, for scores that need gradients; default: what the batches imply (labels, the
            next token), see `core.loss.loss_of`.
        only, skip: which layers; a role (`all`, `attention`, `ffn`, `encoder`, `decoder`, `head`), a glob over
            module paths, a module type, a predicate `(path, module) -> bool`, or a list of these. The
            default is every layer but embeddings, routers and the vocabulary head of language models.
        masks: masks of an earlier call: what they prune stays pruned and counts towards the sparsity.
        keep_originals: keep a copy of the weights in the masks, so that `undo_` can put them back.
        seed: for random scores.

    Returns:
        One mask for each pruned parameter, True = kept.

    Raises:
        UsageError: see `plan`; also missing data, or a target that cannot be reached exactly.
        NumericError: NaN or Inf in weights, activations or scores, naming the layer.

    Cost: one forward pass of the data if the score needs them; scores are computed a layer at a time, once
        where counts do not depend on them, three times for `globally`; extra memory one layer's scores and one
        byte a weight for the masks.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> prune_(model, 0.5)
        Masks(2 parameters, 48 of 96 pruned, sparsity 0.5000)
    """
    todo = plan(model, sparsity, recipe, nonzero=nonzero, only=only, skip=skip)
    layers = {layer.name: layer for layer in todo.layers}
    _check_masks(masks, layers)
    _check_weights(todo.layers)
    if recipe.update is not None:
        data = _for_update(recipe, data, masks)
    statistics = cache(lambda: _gather(model, todo, data, loss))
    candidates = {
        name: _candidates(todo, layer, statistics, masks, seed, zeros_last=nonzero is not None)
        for name, layer in layers.items()
    }
    if recipe.update is None:
        statistics()  # what is wrong with the data is said before anything else
    counts = recipe.allocation(candidates, todo.keep or 0)
    _check_total(todo, candidates, counts)
    if recipe.update is not None:
        return _mended(model, todo, counts, data or (), loss, seed, keep_originals, nonzero)
    kept = {name: _mask(recipe, layers[name], candidates[name], counts[name]) for name in layers}
    _check_stays_pruned(kept, masks)
    if nonzero is not None:
        _check_nonzero(layers, kept, nonzero)
    originals = {name: layers[name].weight.detach().clone() for name in layers} if keep_originals else None
    result = Masks(kept, originals)
    result.apply_(model)
    return result


def _for_update(recipe: Recipe, data: Iterable[Any] | None, masks: Masks | None) -> list[Any]:
    """The data as a list, because an allocator may want to look at them before the update does."""
    if masks is not None:
        raise UsageError(
            f"{recipe.update!r} finds its own masks and cannot start from earlier ones; leave masks out"
        )
    if data is None:
        names = ", ".join(update_statistics(recipe))
        raise UsageError(f"{recipe.update!r} needs calibration data for {names}; pass data=")
    return list(data)


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
    layers = {layer.name: layer for layer in todo.layers}
    changed: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
    changed |= {_bias_name(layers[name]): bias for name, bias in own_biases(model, todo.layers).items()}
    originals = {name: parameter.detach().clone() for name, parameter in changed.items()}
    names = [name for name in {*todo.statistics, *update_statistics(todo.recipe)} if name in STATISTICS]
    slopes = [name for name in todo.statistics if name in GRADIENTS]  # of the dense model: the stream has none
    dense = gather_all(model, todo.layers, slopes, data, loss) if slopes else {}

    def scores(layer: Layer, part: int, known: Mapping[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {name: known[name] for name in todo.statistics if name in known}
        given |= {name: dense[layer.name][name][part] for name in slopes}
        if "generator" in todo.statistics:
            given["generator"] = torch.Generator().manual_seed(_seed_of(seed, f"{layer.name}:{part}"))
        matrix = layer.layout.to_matrices(layer.weight.detach())[part].float()
        return _score(todo, layer, matrix, given)

    try:
        kept = mend_(model, todo.layers, todo.recipe, counts, names, data, scores).masks
        if nonzero is not None:
            _check_nonzero(layers, kept, nonzero)
    except BaseException:
        with torch.no_grad():
            for name, parameter in changed.items():
                parameter.copy_(originals[name])
        raise
    return Masks({name: kept[name] for name in layers}, originals if keep_originals else None)


def _bias_name(layer: Layer) -> str:
    return f"{layer.path}.{layer.layout.bias}" if layer.path else str(layer.layout.bias)


def _statistics_of(score: Callable[..., Any]) -> tuple[str, ...]:
    """The parameter names of a score, after the weight, say what it needs to know."""
    try:
        names = tuple(inspect.signature(score).parameters)[1:]
    except (TypeError, ValueError):
        raise UsageError(f"score {score!r} is no function of (weight, <statistics by name>)") from None
    known = (*KNOWN, "generator")
    for name in names:
        if name not in known:
            raise UsageError(
                f"score {getattr(score, '__name__', score)!r} asks for {name!r}, which is no known statistic; "
                f"{nearest(name, known)}"
            )
    return names


def _gather(
    model: nn.Module, todo: Plan, data: Iterable[Any] | None, loss: Loss | None
) -> dict[str, dict[str, Tensor]]:
    names = [name for name in todo.statistics if name in KNOWN]
    if not names:
        return {}
    if data is None:
        raise UsageError(
            f"{todo.recipe.describe()['score']} needs calibration data for {', '.join(names)}; pass data="
        )
    return gather_all(model, todo.layers, names, data, loss)


def _candidates(
    todo: Plan,
    layer: Layer,
    statistics: Callable[[], Mapping[str, Mapping[str, Tensor]]],
    masks: Masks | None,
    seed: int,
    zeros_last: bool,
) -> Candidates:
    """The units of one layer, their scores computed when asked for."""
    part, out, columns = layer.layout.shape
    pattern = todo.recipe.pattern
    shape = shape_of(todo.recipe, layer)

    checked = False

    def scores() -> Tensor:
        nonlocal checked
        matrices = layer.layout.to_matrices(layer.weight.detach()).float()
        known = statistics().get(layer.name, {})
        inputs: dict[str, Any] = {name: values.to(matrices.device) for name, values in known.items()}
        if "generator" in todo.statistics:
            inputs["generator"] = [torch.Generator().manual_seed(_seed_of(seed, layer.name))] * part
        scored = [
            _score(todo, layer, matrices[p], {name: inputs[name][p] for name in todo.statistics}, not checked)
            for p in range(part)
        ]
        checked = True  # the same scores come every time
        whole = scored[0] if part == 1 else torch.cat(scored)
        units = pattern.pool(whole)
        if zeros_last:
            units = units.masked_fill(matrices.reshape(whole.shape) == 0, -float("inf"))
        if masks is not None and layer.name in masks:
            pruned = ~layer.layout.to_matrices(masks[layer.name]).reshape(part * out, columns)
            units = units.masked_fill(pattern.pool(pruned.float()).to(units.device) == 1, -float("inf"))
        return units

    def weights() -> Tensor:
        return pattern.pool(layer.layout.to_matrices(layer.weight.detach()).reshape(part * out, columns))

    cells = layer.size // (shape[0] * shape[1])
    plain = todo.recipe.score is magnitude.score and cells == 1 and masks is None and not zeros_last
    return Candidates(shape, cells, scores, weights if plain else None)


def _score(todo: Plan, layer: Layer, matrix: Tensor, given: dict[str, Any], check: bool = True) -> Tensor:
    """One matrix's scores; anybody may have written the score, so what it returns is checked."""
    result = todo.recipe.score(matrix, **given)
    if not isinstance(result, Tensor) or result.shape != matrix.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise UsageError(
            f"{layer.name}: score {todo.recipe.describe()['score']!r} is to return one number for each of the weights, "
            f"shape {tuple(matrix.shape)}, got {got}"
        )
    result = result.detach().float()
    if check and not _finite(result):
        raise NumericError(f"{layer.name}: NaN or Inf among its scores; look at its weights and at the data")
    return result


def _finite(values: Tensor) -> bool:
    return all(bool(end.isfinite()) for end in values.aminmax())  # ten times faster than isfinite().all()


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _check_masks(masks: Masks | None, layers: Mapping[str, Layer]) -> None:
    for name, mask in (masks or {}).items():
        if name not in layers:
            raise UsageError(
                f"the earlier masks prune {name}, which is not chosen now; choose it too, or leave masks out"
            )
        check_fits(name, mask, {name: layers[name].weight})


def _check_weights(layers: Iterable[Layer]) -> None:
    """Before the data run through the model, so that the layer named is the one that is ill."""
    for layer in layers:
        if layer.weight.is_meta:
            raise UsageError(f"{layer.name} is on the meta device and has no values; load the weights first")
        if not _finite(layer.weight.detach().float()):
            raise NumericError(
                f"{layer.name}: NaN or Inf among its weights, read as float32; it cannot be pruned"
            )


def _check_total(todo: Plan, candidates: Mapping[str, Candidates], counts: Mapping[str, Tensor]) -> None:
    """Exactly what was asked, or an error before anything is changed."""
    kept = sum(int(counts[name].sum()) * layer.cells for name, layer in candidates.items())
    if todo.keep is None:
        if kept == todo.size:
            raise UsageError(f"{todo.recipe}: no weight is pruned by it; every score lies above. Raise it")
        return
    unit = max(layer.cells for layer in candidates.values())
    if abs(kept - todo.keep) >= max(unit, 1):
        raise UsageError(
            f"{todo.recipe}: sparsity {todo.sparsity:.4f} cannot be reached in whole units; "
            f"nearest {1 - kept / todo.size:.4f}"
        )


def _mask(recipe: Recipe, layer: Layer, candidates: Candidates, counts: Tensor) -> Tensor:
    """The mask of one parameter from how many units each of its competitions keeps."""
    part, out, columns = layer.layout.shape
    keys, competing = candidates.keys(), candidates.shape[1]
    if len(counts) == 1:  # the whole layer is one competition
        keys, competing = keys.reshape(1, -1), candidates.units
    kept = smallest(keys, competing - counts).logical_not_().reshape(candidates.shape)
    whole = recipe.pattern.spread(kept, (part * out, columns))
    return layer.layout.from_matrices(whole.reshape(part, out, columns)).contiguous()


def _check_stays_pruned(kept: Mapping[str, Tensor], masks: Masks | None) -> None:
    """A lower share than the earlier masks took, or units that hold pruned and kept weights, would bring some back."""
    for name, mask in (masks or {}).items():
        back = int(torch.count_nonzero(kept[name] & ~mask.to(kept[name].device)))
        if back:
            raise UsageError(
                f"{name}: {back:,} of the weights that the earlier masks prune would be kept again; ask for a higher "
                "sparsity with the pattern and allocation of before, or leave masks out"
            )


def _check_nonzero(layers: Mapping[str, Layer], kept: Mapping[str, Tensor], nonzero: int) -> None:
    """Kept weights that happen to be zero would fall short of the promised number."""
    for name, mask in kept.items():
        idle = int(torch.count_nonzero(mask & (layers[name].weight == 0)))
        if idle:
            raise UsageError(
                f"{name}: {idle:,} of the weights it would keep are already zero, so {nonzero:,} non-zeros cannot be "
                "reached with equal shares; use a global allocation"
            )
