"""Allocations tried out: what a pruned copy predicts on held-out data decides, and equal shares win a tie.

Rules that tell from scores which layers should pay more help one method and hurt another. So every allocation is
judged by the divergence of the pruned model's predictions from the dense model's, on data that pruning has
not seen, and the recipe's own equal shares stay unless another one is better.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.shares import Shares, Slope
from secateur.core.forward import logits_of, undisturbed
from secateur.core.masks import Masks
from secateur.core.statistics import forward
from secateur.core.where import Layer, Only, select
from secateur.errors import NumericError, UsageError
from secateur.prune import prune_
from secateur.recipes import Recipe

__all__ = ["Judge", "Trial", "evolve", "finished", "try_allocations", "try_slopes"]

Mend = Callable[[nn.Module, Masks], None]

CACHED = 1 << 26  # dense predictions kept: 256 MiB in float32; beyond that they are computed anew
HOPELESS = 1.5  # times the divergence of the best so far, before mending: not worth mending


@dataclass(frozen=True)
class Trial:
    """One way of pruning and what held-out data say of it.

    Attributes:
        name: what was tried.
        divergence: KL(dense || pruned) on the held-out data, nats a token.
        recipe: with the allocation that was tried.
        mended: whether `mend` is part of it; it is taken back where held-out data like it less.
        bare: the divergence before `mend`; the same where there was none.
        model: the pruned copy; None where it was not kept.
        masks: of that copy.
    """

    name: str
    divergence: float
    recipe: Recipe
    mended: bool = False
    bare: float = float("inf")
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    masks: Masks | None = field(default=None, repr=False, compare=False)


class Judge:
    """Mean KL(dense || model) in nats a token over the real tokens of held-out batches.

    Args:
        dense: the model before pruning; not changed, and not to be changed while the judge is in use.
        data: held-out batches, of any model that gives logits.

    Raises:
        UsageError: no batch.
        NumericError: when called, a divergence that is NaN or infinite.

    Cost: a forward pass of the model; the first time one of the dense model too, whose predictions are kept
        where they take no more than 256 MiB.
    """

    def __init__(self, dense: nn.Module, data: Iterable[Any]):
        self.dense, self.data = dense, list(data)
        if not self.data:
            raise UsageError("there is no held-out batch to judge by; give more data")
        self._kept: dict[int, Tensor] = {}
        self._room = CACHED

    def __call__(self, model: nn.Module) -> float:
        """The divergence of one model."""
        total, tokens = 0.0, 0
        for place, batch in enumerate(self.data):
            expected = self._expected(place, batch)
            found = _log_probabilities(model, batch)
            total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            tokens += expected.shape[0]
        if not abs(total) < float("inf"):
            raise NumericError(
                "the divergence from the dense model is NaN or infinite; look at the pruned weights"
            )
        return max(0.0, total / tokens)

    def _expected(self, place: int, batch: Any) -> Tensor:
        if place in self._kept:
            return self._kept[place]
        found = _log_probabilities(self.dense, batch)
        if found.numel() <= self._room:
            self._kept[place] = found
            self._room -= found.numel()
        return found


def _log_probabilities(model: nn.Module, batch: Any) -> Tensor:
    """Log-probabilities `(token, class)` at every real position."""
    with undisturbed(model):
        logits = logits_of(forward(model, batch)).float()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool().to(logits.device)]
    return logits.reshape(-1, logits.shape[-1]).log_softmax(-1)


def try_allocations(
    model: nn.Module,
    sparsity: float | None,
    recipe: Recipe,
    data: Iterable[Any],
    judge: Callable[[nn.Module], float],
    allocators: Sequence[Callable[..., Any]],
    *,
    tried: Sequence[Trial] = (),
    mend: Mend | None = None,
    only: Only = None,
    skip: Only = None,
    seed: int = 0,
) -> list[Trial]:
    """Prune copies with the recipe's own allocator and with others, and judge each.

    Args:
        model: dense; not changed.
        sparsity: of the chosen layers together, in [0, 1].
        recipe: everything but the allocator.
        data: calibration batches.
        judge: pruned model -> divergence, lower is better; see `Judge`.
        allocators: to try besides the recipe's own.
        tried: what was tried before, best first, the recipe's own allocator among them, so that it is not tried
            again.
        mend: `(pruned model, masks) -> None`, what follows pruning; an allocation that wins before it can lose
            after it, so each is judged with it, except where it is 1.5 times worse before it than another.
        only, skip, seed: as in `prune_`.

    Returns:
        The trials, best first; of equal ones the recipe's own allocator, then earlier ones, come first. Only the
        first keeps its model.

    Cost: one pruning and one judgement each; memory for two copies of the model.
    """
    batches = list(data)
    trials = list(tried)
    for allocate in allocators if tried else (recipe.allocate, *allocators):
        part = replace(recipe, allocate=allocate)
        pruned = copy.deepcopy(model)
        masks = prune_(pruned, sparsity, part, data=batches, only=only, skip=skip, seed=seed)
        divergence = judge(pruned)
        name = part.describe()["allocate"]
        trial = Trial(name, divergence, part, bare=divergence, model=pruned, masks=masks)
        if mend is not None and not (trials and divergence > HOPELESS * trials[0].bare):
            trial = finished(trial, mend, judge)
        trials = _ranked(trials, trial)
    return trials


def _ranked(trials: Sequence[Trial], new: Trial) -> list[Trial]:
    """Best first, earlier ones before equal ones; only the first keeps its model."""
    ranked = sorted([*trials, new], key=lambda trial: trial.divergence)
    return [ranked[0], *(replace(trial, model=None, masks=None) for trial in ranked[1:])]


def finished(trial: Trial, mend: Mend, judge: Callable[[nn.Module], float]) -> Trial:
    """The trial mended, or as it was where held-out data like that no better.

    Args:
        trial: one that holds its model; that is not changed.
        mend: changes the model it gets, a copy, in place.
        judge: pruned model -> divergence, lower is better.
    """
    mended = copy.deepcopy(trial.model)
    if mended is None or trial.masks is None:
        raise UsageError(f"{trial.name}: this trial did not keep its model; only the best one does")
    mend(mended, trial.masks)
    divergence = judge(mended)
    better = divergence < trial.divergence
    return replace(trial, divergence=divergence, model=mended, mended=True) if better else trial


def try_slopes(
    model: nn.Module,
    sparsity: float,
    recipe: Recipe,
    data: Iterable[Any],
    judge: Callable[[nn.Module], float],
    *,
    step: float = 0.1,
    most: int = 4,
    mend: Mend | None = None,
    only: Only = None,
    skip: Only = None,
    seed: int = 0,
) -> list[Trial]:
    """Find one parameter, how much sparser the last block is than the first, by what held-out data say.

    Args:
        step: first rise tried, to both sides of equal shares; the better side is followed, doubling, as long
            as it gets better.
        most: slopes tried at most.
        model, sparsity, recipe, data, judge, mend, only, skip, seed: as in `try_allocations`.

    Returns:
        As `try_allocations`: equal shares and the slopes, best first.
    """
    batches, room = list(data), min(1.0, 2 * min(sparsity, 1 - sparsity))
    options: dict[str, Any] = {"mend": mend, "only": only, "skip": skip, "seed": seed}

    def tried(trials: Sequence[Trial], *rises: float) -> list[Trial]:
        slopes = [Slope(rise) for rise in rises]
        return try_allocations(model, sparsity, recipe, batches, judge, slopes, tried=trials, **options)

    trials = try_allocations(model, sparsity, recipe, batches, judge, (), **options)
    trials = tried(trials, *[rise for rise in (step, -step) if abs(rise) <= room][:most])
    while len(trials) <= most and isinstance(slope := trials[0].recipe.allocate, Slope):
        if abs(2 * slope.rise) > room:
            break
        before = trials[0]
        trials = tried(trials, 2 * slope.rise)
        if trials[0] is before:
            break
    return trials


def evolve(
    model: nn.Module,
    sparsity: float,
    recipe: Recipe,
    data: Iterable[Any],
    judge: Callable[[nn.Module], float],
    *,
    step: float = 0.05,
    levels: int = 2,
    generations: int = 12,
    offspring: int = 4,
    only: Only = None,
    skip: Only = None,
    seed: int = 0,
) -> Shares:
    """Search a sparsity for each layer: a mutation makes one layer denser and others sparser; the best survives.

    The model is pruned at `2 levels + 1` sparsities once; a candidate is stitched together of layers from
    these, which costs no pruning, and judged. What comes out must be judged again with the recipe itself
    (`try_allocations`), because layers pruned together are not those pruned apart.

    Args:
        step: between neighbouring levels of sparsity.
        levels: to each side of `sparsity`.
        generations, offspring: candidates judged: their product.
        model, sparsity, recipe, data, judge, only, skip, seed: as in `try_allocations`.

    Returns:
        Shares of the best candidate; all equal where none was better than equal shares.

    Cost: `2 levels + 1` prunings and `generations * offspring` judgements; memory for as many copies of the
        chosen layers as there are levels.

    Source: EvoPress (Sieberling et al. 2024), (1 + lambda) evolution with level switches. Deviations: one
        selection stage; layers of unequal sizes; one database for all layers, each level pruned as a whole.
    """
    grid = [sparsity + step * k for k in range(-levels, levels + 1)]
    grid = [each for each in grid if 0 <= each <= 1]
    batches, chosen = list(data), select(model, only, skip).chosen
    stitched = copy.deepcopy(model)
    base: list[dict[str, Tensor]] = []
    for each in grid:
        pruned = copy.deepcopy(model)
        prune_(pruned, each, recipe, data=batches, only=only, skip=skip, seed=seed)
        parameters = dict(pruned.named_parameters(remove_duplicate=False))
        base.append({layer.name: parameters[layer.name].detach() for layer in chosen})
    target = dict(stitched.named_parameters(remove_duplicate=False))

    def worth(genes: Sequence[int]) -> float:
        with torch.no_grad():
            for layer, gene in zip(chosen, genes, strict=True):
                target[layer.name].copy_(base[gene][layer.name])
        return judge(stitched)

    generator = torch.Generator().manual_seed(seed)
    best = [grid.index(sparsity)] * len(chosen)
    value = worth(best)
    for _ in range(generations):
        for child in [_mutated(best, chosen, len(grid), generator) for _ in range(offspring)]:
            if (found := worth(child)) < value:
                best, value = child, found
    return Shares(
        {layer.name: min(1.0, max(0.0, grid[gene])) for layer, gene in zip(chosen, best, strict=True)}
    )


def _mutated(
    genes: Sequence[int], layers: Sequence[Layer], count: int, generator: torch.Generator
) -> list[int]:
    """One to three layers a level denser, then others sparser until no more weights are kept than before."""
    child = list(genes)
    budget = sum(gene * layer.size for gene, layer in zip(genes, layers, strict=True))
    order = torch.randperm(len(child), generator=generator).tolist()
    switches = 1 + int(torch.randint(3, (2,), generator=generator).min())
    denser = [place for place in order if child[place] > 0][:switches]
    for place in denser:
        child[place] -= 1
    for place in order[::-1]:
        if sum(gene * layer.size for gene, layer in zip(child, layers, strict=True)) >= budget:
            break
        if place not in denser and child[place] < count - 1:
            child[place] += 1
    paid = sum(gene * layer.size for gene, layer in zip(child, layers, strict=True)) >= budget
    return child if paid else list(genes)
