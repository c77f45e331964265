"""Prune from file to file, a tensor at a time: everything that needs no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn

from secateur.checks import check_nonzero, check_total
from secateur.core.counts import distinct_parameters
from secateur.core.halves import count_nonzero
from secateur.core.masks import zero_
from secateur.core.select import Candidates
from secateur.core.where import Layer
from secateur.errors import NumericError, UsageError
from secateur.measure import Tell
from secateur.prune import Plan
from secateur.scoring import candidates_of, finite, mask_of
from secateur.stream.output import Output
from secateur.stream.places import Places

__all__ = [
    "Work",
    "carry_over",
    "count_nonzeros",
    "holding",
    "keep_counts",
    "prune_tensors",
    "read_checked",
    "units_of",
    "weights_to_keep",
    "write_pruned",
]

Statistics = Callable[[], Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Work:
    """What is to be pruned and from where.

    Attributes:
        model: the modules, without values.
        todo: the plan.
        places: where the weights lie.
        nonzero: exact number of non-zeros asked for, None where a sparsity was.
        seed: for random scores.
        tell: progress.
        budget: bytes of memory allowed, None where there is no limit.
    """

    model: Any
    todo: Plan
    places: Places
    nonzero: int | None
    seed: int
    tell: Tell
    budget: int | None = None

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers to prune by name."""
        return {layer.name: layer for layer in self.todo.layers}

    @property
    def sites(self) -> dict[str, Any]:
        """Where units compete, one site a layer."""
        return {site.name: site for site in self.todo.sites}

    def candidates(self, statistics: Statistics) -> dict[str, Candidates]:
        """The units of every layer; scores read the layer's weight when asked for and let it go again."""
        steps = count()
        return {layer.name: self._candidates(layer, statistics, steps) for layer in self.todo.layers}

    def shell(self, layer: Layer, statistics: Statistics) -> Candidates:
        """The units of a layer whose weight is held while the scores are asked for."""
        site = self.sites[layer.name]
        return candidates_of(self.todo.recipe, site, statistics, None, self.seed, self.nonzero is not None)

    def _candidates(self, layer: Layer, statistics: Statistics, steps: Iterator[int]) -> Candidates:
        shell, layers = self.shell(layer, statistics), len(self.todo.layers)

        def read(what: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def found() -> Tensor:
                with holding(layer, read_checked(self.places, layer)):
                    values = what()
                passes, done = divmod(next(steps), layers)
                self.tell(f"scores, pass {passes + 1}", done + 1, layers)
                return values

            return found

        magnitudes = shell.magnitudes and read(shell.magnitudes)
        return Candidates(shell.shape, shell.cells, read(shell.scores), magnitudes=magnitudes)


def read_checked(places: Places, layer: Layer) -> Tensor:
    """A layer's weight as it is stored.

    Raises:
        NumericError: NaN or Inf in it.
    """
    weight = places.read(layer.name)
    if not finite(weight):
        raise NumericError(f"{layer.name}: NaN or Inf among its weights; it cannot be pruned")
    return weight


@contextmanager
def holding(layer: Layer, weight: Tensor) -> Iterator[None]:
    """Give a module without values this weight for the time of the block."""
    own = layer.module._parameters
    empty = own[layer.layout.name]
    own[layer.layout.name] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        own[layer.layout.name] = empty


def keep_counts(work: Work, statistics: Statistics) -> dict[str, Tensor]:
    """Units kept in each competition of each layer, exactly as the recipe's allocator says.

    Cost: no read where counts do not depend on scores; about two reads of all chosen layers for `globally`.
    """
    candidates = work.candidates(statistics)
    counts = work.todo.recipe.allocation(candidates, work.todo.keep or 0)
    check_total(work.todo, candidates, counts)
    return counts


def prune_tensors(work: Work, counts: Mapping[str, Tensor], statistics: Statistics, output: Output) -> None:
    """Write every tensor of the checkpoint: chosen layers pruned, all others as they are."""
    layers = work.layers
    order = units_of(work)
    for step, unit in enumerate(order):
        work.tell("writing", step, len(order))
        if unit in output.journal.done:
            continue
        if unit in layers:
            found = _prune_one(work, layers[unit], counts[unit], statistics, output)
        else:
            carry_over(work, unit, output)
            found = None
        output.finished(unit, found)
    output.flush()
    work.tell("writing", len(order), len(order))


def carry_over(work: Work, unit: str, output: Output) -> None:
    """Write a tensor that nothing is pruned of: as it is, or with its slices in their new places."""
    if unit not in work.places.orders:
        output.copy(unit)
        return
    for stored, values in work.places.parts(unit, work.places.read(unit)):
        output.write(stored, values)


def units_of(work: Work) -> list[str]:
    """Layers, parameters put in order, and tensors that are neither, in the order in which they lie in the files."""
    places = work.places
    owner = {}
    for name in (*work.layers, *places.orders):
        stored = [piece.name for piece in places.pieces[name]]
        owner.update(dict.fromkeys([*stored, *places.copies.get(name, ())], name))
    return list(dict.fromkeys(owner.get(name, name) for name in places.shards.tensors))


def _prune_one(
    work: Work, layer: Layer, counts: Tensor, statistics: Statistics, output: Output
) -> dict[str, int]:
    weight = read_checked(work.places, layer)
    with holding(layer, weight):
        mask = mask_of(work.sites[layer.name], work.shell(layer, statistics), counts)[layer.name]
        if work.nonzero is not None:
            check_nonzero({layer.name: weight}, {layer.name: mask}, work.nonzero)
    zero_(weight, mask)
    return write_pruned(work, layer, weight, mask, output)


def write_pruned(work: Work, layer: Layer, weight: Tensor, mask: Tensor, output: Output) -> dict[str, int]:
    """Write one layer and its mask; how many weights are pruned and how many are zero."""
    for name, values in work.places.parts(layer.name, weight):
        output.write(name, values)
    output.write_mask(layer.name, mask)
    return {
        "pruned": mask.numel() - count_nonzero(mask),
        "zeros": weight.numel() - count_nonzero(weight),
    }


def count_nonzeros(model: nn.Module, places: Places, chosen: tuple[Layer, ...]) -> tuple[int, int]:
    """Non-zeros of the chosen layers and of all other parameters, tied ones once.

    Cost: one read of the checkpoint.
    """
    names = {name for layer in chosen for name in (layer.name, *layer.tied)}
    own = sum(count_nonzero(places.read(layer.name)) for layer in chosen)
    others = 0
    for name in distinct_parameters(model):
        if name not in names:
            places.check([name])
            others += count_nonzero(places.read(name))
    return own, others


def weights_to_keep(own: int, others: int, nonzero: int) -> int:
    """The number of non-zeros of the whole model as weights kept in the chosen layers."""
    if not others <= nonzero <= others + own:
        raise UsageError(
            f"{nonzero:,} non-zero parameters cannot be reached: the chosen layers hold {own:,} of the model's "
            f"{others + own:,}, so {others:,} to {others + own:,} are possible. Choose other layers or another "
            "number"
        )
    return int(nonzero) - others
