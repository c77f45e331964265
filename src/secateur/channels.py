"""permute_channels_: inputs put into the order in which N:M keeps most; what computes them follows, so nothing is
gathered when the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.checks import check_weights
from secateur.core.axes.found import Units
from secateur.core.example import Example, analysis_of, main_output
from secateur.core.forward import undisturbed
from secateur.core.where import Layer, Only, select
from secateur.errors import NumericError, UsageError
from secateur.ordering import channel_order, kept_score
from secateur.pattern import NM
from secateur.pattern.axis import columns_of
from secateur.recipes import Recipe
from secateur.scoring import Statistics, gather_for, scored, statistics_of
from secateur.target import check_recipe, shape_of

__all__ = [
    "Axis",
    "Permuted",
    "check_same",
    "groups_of",
    "orderable",
    "permute_channels_",
    "put_in_order_",
    "readers_of",
    "reordered",
]

Readers = list[tuple[Layer, Tensor]]  # a matrix, and the columns "unit copy" that each unit feeds
Axis = tuple[Units, Readers]


@dataclass(frozen=True)
class Permuted:
    """What `permute_channels_` did.

    Attributes:
        kept: axis -> the share of the score that N:M keeps in the order as it was, and in the new one.
        left_out: axes and matrices whose order stays, each with the reason.
    """

    kept: dict[str, tuple[float, float]]
    left_out: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        if not self.kept:
            return "no input channels were put in order"
        before, after = (sum(pair[i] for pair in self.kept.values()) / len(self.kept) for i in (0, 1))
        noun = "axis" if len(self.kept) == 1 else "axes"
        return (
            f"input channels put in order on {len(self.kept)} {noun}: of their score {after:.4f} is kept instead of "
            f"{before:.4f}"
        )

    @property
    def told(self) -> str:
        """What a reader who compares the result with the dense model has to know."""
        left = "; ".join(f"{name}: {why}" for name, why in self.left_out)
        return (
            f"Before pruning, {self}. The model computes the same, but its rows and columns stand in another order "
            f"than those of the dense model, and so do the masks.{f' Left in their order: {left}.' if left else ''}"
        )


def permute_channels_(
    model: nn.Module,
    recipe: Recipe,
    data: Iterable[Any] | None = None,
    *,
    example: Any = None,
    only: Only = None,
    skip: Only = None,
    block: int = 512,
    seed: int = 0,
) -> Permuted:
    """Put input channels in the order in which the recipe's N:M keeps most of its score, before pruning.

    Inputs can change places where whatever computes them can: neurons of feed-forwards, dimensions of values (all
    heads alike), channels. These axes are found in the model's own computation; the rows that compute them, biases
    and norms between follow the columns that read them, and the model computes what it did before. Inputs that many
    blocks share (the residual stream) keep their order.

    Args:
        model: any module that can be exported; changed in place.
        recipe: its pattern is an `NM`, its score is what is to be kept.
        data: calibration batches, where the score needs them.
        example: one input to follow through the model; default: the first batch of the data.
        only, skip: which matrices are going to be pruned; as in `prune_`. What computes their inputs may be any.
        block: see `ordering.channel_order`.
        seed: of random scores.

    Raises:
        UsageError: a pattern that is no N:M, no example, a model that cannot be exported, scipy missing.
        NumericError: NaN or Inf, or a model that computes something else afterwards. On any error the model is as
            before.

    Cost: an export, a forward pass of the data if the score needs them, and see `channel_order`.

    Source: Zhang et al. 2024 (RIA), channel permutation. Deviation: the authors undo the order when the model runs.

    Example:
        >>> from dataclasses import replace
        >>> from secateur import magnitude
        >>> mlp = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> found = permute_channels_(mlp, replace(magnitude, pattern=NM(2, 4)), example=torch.zeros(2, 4))
        >>> list(found.kept), found.left_out
        (['feed-forward units of 0,2'], (('0.weight', 'nothing in the model computes its inputs in another order'),))
    """
    check_recipe(recipe)
    groups = groups_of(recipe)
    batches = None if data is None else list(data)
    if example is None and not batches:
        raise UsageError(
            "channels are put in order by following one input through the model; pass example= or data="
        )
    chosen = {layer.name: layer for layer in select(model, only, skip).chosen}
    for layer in chosen.values():
        shape_of(recipe, layer)  # a layer narrower than m is told before anything runs
    check_weights(chosen.values())
    analysis, inputs = analysis_of(model, batches[0] if example is None and batches else example)
    axes, left_out = orderable(analysis.units, chosen, groups.m)
    readers = readers_of(axes)
    known = gather_for(model, recipe, readers, batches) if readers else {}
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    before = _answer(model, inputs)
    try:
        kept, _ = put_in_order_(model, recipe, axes, known, block=block, seed=seed, changed=changed)
        check_same(before, _answer(model, inputs))
    except BaseException:
        with torch.no_grad():
            for tensor, old in changed.values():
                tensor.copy_(old)
        raise
    return Permuted(kept, left_out)


def groups_of(recipe: Recipe) -> NM:
    """The recipe's N:M.

    Raises:
        UsageError: it has another pattern.
    """
    if not isinstance(recipe.pattern, NM):
        raise UsageError(f"channels are put in order for N:M, such as NM(2, 4); got {recipe.pattern!r}")
    return recipe.pattern


def readers_of(axes: Iterable[Axis]) -> list[Layer]:
    """The matrices whose columns these axes are, each once."""
    return list({layer.name: layer for _, found in axes for layer, _ in found}.values())


def put_in_order_(
    model: nn.Module,
    recipe: Recipe,
    axes: Iterable[Axis],
    known: Statistics,
    *,
    block: int,
    seed: int,
    changed: dict[str, tuple[Tensor, Tensor]],
) -> tuple[dict[str, tuple[float, float]], list[Tensor]]:
    """Find the order of one axis after the other, and put what carries it in that order.

    Args:
        model: changed in place.
        recipe: score and N:M.
        axes: from `orderable`.
        known: statistics of their readers.
        block: see `ordering.channel_order`.
        seed: of random scores.
        changed: gets every changed tensor, by name, and what it was before.

    Returns:
        What each axis keeps before and after, see `Permuted`; and the orders.
    """
    groups, kept, orders = groups_of(recipe), {}, []
    for units, found in axes:
        scores = _scores(recipe, found, known, seed)
        order = channel_order(scores, groups.n, groups.m, block=block)
        whole = float(scores.sum(dtype=torch.float64)) or 1.0
        pair = [kept_score(each, groups.n, groups.m) for each in (scores, scores[:, order])]
        kept[units.name] = pair[0] / whole, pair[1] / whole
        orders.append(order)
        _reorder_(model, units, order, changed)
    return kept, orders


def orderable(
    all_units: Iterable[Units], chosen: dict[str, Layer], m: int
) -> tuple[list[Axis], tuple[tuple[str, str], ...]]:
    """Axes whose units may change places and are single inputs of chosen matrices; the others with the reason."""
    axes: list[Axis] = []
    left_out: list[tuple[str, str]] = []
    taken: set[str] = set()
    for units in all_units:
        found = list(_readers(units, chosen))
        if not found or any(not _neighbours(columns) for _, columns in found):
            continue  # nothing reads it, or its units are whole heads
        names = [layer.name for layer, _ in found]
        if not units.exact:
            left_out.append((units.name, f"all blocks share their order; {units.reason}"))
        elif units.constants or units.gathers:
            left_out.append(
                (units.name, f"their places count: {'; '.join([*units.constants, *units.gathers])}")
            )
        elif units.size % m or any(int(columns[0].min()) % m for _, columns in found):
            left_out.append((units.name, f"{units.size} are no whole groups of {m}"))
        elif taken & set(names):
            left_out.append((units.name, "another axis of the same matrix is put in order"))
        else:
            axes.append((units, found))
            taken |= set(names)
    told = {member.name for units in all_units for member in units.members if units.name in dict(left_out)}
    why = "nothing in the model computes its inputs in another order"
    left_out += [(name, why) for name in chosen if name not in taken and name not in told]
    return axes, tuple(left_out)


def _readers(units: Units, chosen: dict[str, Layer]) -> Iterator[tuple[Layer, Tensor]]:
    for member in units.members:
        layer = chosen.get(member.name)
        columns = columns_of(layer, member) if layer is not None else None
        if layer is not None and columns is not None:
            yield layer, columns


def _neighbours(columns: Int[Tensor, "unit copy"]) -> bool:
    """Whether neighbouring units feed neighbouring columns."""
    return bool((columns[1:] - columns[:-1] == 1).all())


def _scores(recipe: Recipe, readers: Readers, known: Statistics, seed: int) -> Float[Tensor, "row unit"]:
    """What every weight that reads a unit is worth; one row for each output and copy."""
    rows, names = [], statistics_of(recipe.score)
    for layer, columns in readers:
        said = scored(recipe, layer, names, known.get(layer.name, {}), seed).of_weights(layer.layout.shape[1])
        flat = said.movedim(0, 1).flatten(1)[:, columns.to(said.device)]
        rows.append(flat.movedim(2, 1).flatten(0, 1))
    return torch.cat(rows)


def _reorder_(
    model: nn.Module, units: Units, order: Int[Tensor, " unit"], changed: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Every tensor that carries the axis, parameters and buffers, in the new order; what it was before in `changed`."""
    for member in units.members:
        path, _, name = member.name.rpartition(".")
        tensor = getattr(model.get_submodule(path), name).detach()
        changed.setdefault(member.name, (tensor, tensor.clone()))
        with torch.no_grad():
            tensor.copy_(reordered(tensor, member.dim, member.indices, order))


def reordered(
    tensor: Tensor, dim: int, indices: Int[Tensor, "unit width"], order: Int[Tensor, " unit"]
) -> Tensor:
    """A copy in which unit `order[i]`, the slices `indices[order[i]]` along `dim`, stands at the places of unit i."""
    places = indices.to(tensor.device)
    moved = tensor.index_select(dim, places[order.to(tensor.device)].flatten())
    return tensor.index_copy(dim, places.flatten(), moved)


def _answer(model: nn.Module, inputs: Example) -> list[Tensor]:
    with undisturbed(model):
        answer = main_output(inputs.run(model))
    return [leaf for leaf in torch.utils._pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]


def check_same(before: list[Tensor], after: list[Tensor]) -> None:
    """Sums in another order differ by rounding, and by nothing more."""
    for old, new in zip(before, after, strict=True):
        size = float(old.abs().max()) if old.numel() else 0.0
        share = min(0.1, 1024 * torch.finfo(old.dtype).eps) if old.is_floating_point() else 0.0
        if not bool(((old - new).double().abs() <= share * size).all()):
            raise NumericError(
                "the model computes something else once its channels are in another order; prune it without permuting"
            )
