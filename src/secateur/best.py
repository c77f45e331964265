"""best_: the strongest combination for a sparsity, picked on held-out data, with the reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate import OWL, globally
from secateur.checks import check_nonzero
from secateur.core.masks import Masks
from secateur.core.visit import merge, split
from secateur.core.where import Layer, Only, select
from secateur.errors import UsageError
from secateur.pattern import Weights
from secateur.prune import Plan, plan
from secateur.recipes import Recipe, alps
from secateur.recover import reconstruct_
from secateur.search import Judge, Trial, evolve, finished, try_allocations, try_slopes

__all__ = ["Best", "Step", "best_", "most_epochs", "most_tried"]

SCOUT = 2  # epochs of reconstruction before an allocation is judged: what it then looks like is what counts
HIGH = 0.6  # from this sparsity on more allocations are tried, and reconstruction may take longer
TOKENS = 2048  # judged in one go

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Step:
    """Something that was tried, and what held-out data said of it.

    Attributes:
        name: what was tried, on top of what was taken before it.
        divergence: KL(dense || pruned) in nats a token on the held-out data.
        taken: whether it is part of the result.
    """

    name: str
    divergence: float
    taken: bool


@dataclass(frozen=True)
class Best:
    """What `best_` did.

    Attributes:
        masks: kept weights, True = kept.
        recipe: score, pattern, allocation and update that were picked.
        reconstructed: whether sub-module reconstruction is part of the result.
        steps: all that was tried, in order.
    """

    masks: Masks = field(repr=False)
    recipe: Recipe
    reconstructed: bool
    steps: tuple[Step, ...]

    @property
    def picked(self) -> str:
        """The combination in one line."""
        return f"{self.recipe}" + (", reconstructed" if self.reconstructed else "")

    def __str__(self) -> str:
        lines = [f"picked {self.picked}", "tried, with the divergence from the dense model on held-out data:"]
        lines += [
            f"  {'+' if step.taken else '-'} {step.name}: {step.divergence:.4f} nats a token"
            for step in self.steps
        ]
        return "\n".join(lines)


def best_(
    model: nn.Module,
    sparsity: float | None = None,
    data: Iterable[Any] | None = None,
    *,
    nonzero: int | None = None,
    pattern: Any = Weights(),  # noqa: B008 - frozen
    held_out: float = 0.125,
    evolution: bool = False,
    epochs: int | None = None,
    only: Only = None,
    skip: Only = None,
    seed: int = 0,
    tell: Tell | None = None,
) -> Best:
    """Prune a language model in place with the combination that does best on held-out calibration data.

    ALPS finds support and weights, each layer calibrated on the already pruned stream; then attention and
    feed-forward of every block are reconstructed with the masks frozen. Where the pattern leaves a choice, equal
    shares compete with shares that rise or fall with depth and, from 60 % on, with OWL and with one cut through the
    whole model; each is judged after a short reconstruction, because an allocation that wins before it often
    loses after it. The judge is the divergence from the dense model on sequences that no step was fitted on;
    what does not help is taken back.

    Args:
        model: any model that gives logits and has repeated blocks; without blocks reconstruction is left out.
        sparsity: zeros as a fraction of the chosen layers, in [0, 1]; leave it out where the pattern fixes it.
        data: calibration batches of equal form; at least two sequences.
        nonzero: instead of a sparsity, the exact number of non-zero parameters that the whole model is to have.
        pattern: single weights, or for instance `NM(2, 4)`.
        held_out: fraction of the sequences that only judge.
        evolution: also search a share for each layer by evolution (about five more prunings).
        epochs: of reconstruction at most; default 10, and 15 from 60 % on.
        only, skip: which layers; as in `prune_`.
        seed: of the choice of held-out sequences, of reconstruction and of evolution.
        tell: progress; called with a label, steps done and steps in all.

    Returns:
        The masks, what was picked, and everything that was tried; the same for the same seed, machine and
        number of threads.

    Raises:
        UsageError: no data, too few sequences, and all that `prune_` refuses.
        NumericError: NaN or Inf in weights, activations or predictions. On any error the model is as before.

    Cost: one pruning by ALPS and two epochs for each allocation tried (1 for N:M, 3 below 60 %, at most 6 from
        there), then `epochs` forward and backward passes of the calibration data through one sub-module at a
        time; memory for three copies of the model.
    """
    if data is None:
        raise UsageError("best needs calibration data; pass data=")
    recipe = replace(alps, pattern=pattern)
    todo = plan(model, sparsity, recipe, nonzero=nonzero, only=only, skip=skip)
    fit, judged = _dealt(merge(list(data)), held_out, seed)
    judge = Judge(model, judged)
    heard = _Heard(tell, most_tried(todo) + evolution + 1)
    rebuild = _Rebuild(model, fit, seed, heard) if _has_blocks(todo.layers) else None
    options: dict[str, Any] = {"mend": rebuild and partial(rebuild, epochs=SCOUT)}
    options |= {"only": only, "skip": skip, "seed": seed}
    trials = _allocated(model, todo.sparsity, recipe, fit, judge, evolution, options)
    steps = [Step(_told(trial), trial.divergence, trial is trials[0]) for trial in trials]
    final = trials[0]
    if rebuild is not None and final.mended:
        most = epochs or most_epochs(todo)
        final = finished(final, partial(rebuild, epochs=most), judge)
        steps.append(Step(f"reconstruction, {most} epochs", final.divergence, final is not trials[0]))
    heard.end()
    assert final.model is not None  # the best trial keeps its model
    assert final.masks is not None
    if nonzero is not None:
        chosen = select(final.model, only, skip).chosen
        check_nonzero({layer.name: layer.weight for layer in chosen}, final.masks, nonzero)
    _copy_(model, final.model, final.masks)
    return Best(final.masks, final.recipe, final.mended, tuple(steps))


def most_epochs(todo: Plan) -> int:
    """Of the last reconstruction, unless the caller says otherwise; the more is pruned the more there is to mend."""
    return 15 if not todo.recipe.fixed_by_pattern and (todo.sparsity or 0.0) >= HIGH else 10


def most_tried(todo: Plan) -> int:
    """Allocations: equal shares and two slopes, from 60 % on a third slope, OWL and one cut through the model."""
    if todo.recipe.fixed_by_pattern:
        return 1
    return 6 if (todo.sparsity or 0.0) >= HIGH else 3


def _allocated(
    model: nn.Module,
    sparsity: float | None,
    recipe: Recipe,
    fit: Any,
    judge: Judge,
    evolution: bool,
    options: dict[str, Any],
) -> list[Trial]:
    """All allocations tried, best first; only the first keeps its model."""
    if recipe.fixed_by_pattern:
        return try_allocations(model, None, recipe, [fit], judge, (), **options)
    assert sparsity is not None  # plan has checked
    trials = try_slopes(model, sparsity, recipe, [fit], judge, most=3 if sparsity >= HIGH else 2, **options)
    others: list[Callable[..., Any]] = [OWL(), globally] if sparsity >= HIGH else []
    trials = try_allocations(model, sparsity, recipe, [fit], judge, others, tried=trials, **options)
    if not evolution:
        return trials
    searched = {key: value for key, value in options.items() if key != "mend"}
    shares = evolve(model, sparsity, recipe, [fit], judge, **searched)
    trials = try_allocations(model, sparsity, recipe, [fit], judge, [shares], tried=trials, **options)
    return [replace(trial, name="evolution") if trial.recipe.allocate == shares else trial for trial in trials]


@dataclass
class _Heard:
    """Progress: how many of the copies to be pruned and reconstructed there are."""

    tell: Tell | None
    total: int
    done: int = 0

    def next(self) -> None:
        """Another copy comes to its reconstruction."""
        if self.tell is not None:
            self.tell("method best", min(self.done, self.total - 1), self.total)
        self.done += 1

    def end(self) -> None:
        """Fewer may have been tried than there might have been."""
        if self.tell is not None and self.done:
            self.tell("method best", self.total, self.total)


@dataclass(frozen=True)
class _Rebuild:
    """Reconstruction of a pruned model on the data to fit on."""

    dense: nn.Module
    fit: Any
    seed: int
    heard: _Heard

    def __call__(self, model: nn.Module, masks: Masks, epochs: int) -> None:
        self.heard.next()
        count = _rows(self.fit)
        if count > 1:
            reconstruct_(
                model, self.dense, masks, [self.fit], epochs=epochs, batch=min(4, count // 2), held_out=0.0625,
                seed=self.seed, tell=self.heard.tell,
            )  # fmt: skip


def _told(trial: Trial) -> str:
    return f"ALPS, {trial.name}" + (f", reconstruction of {SCOUT} epochs" if trial.mended else "")


def _rows(batch: Any) -> int:
    tensors = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    return next(len(value) for value in tensors if isinstance(value, Tensor))


def _dealt(batch: Any, held_out: float, seed: int) -> tuple[Any, list[Any]]:
    """The sequences to fit on, in random order, and those to judge by, in small pieces."""
    count = _rows(batch)
    judges = max(1, round(held_out * count)) if 0 < held_out < 1 else 0
    if not 0 < judges < count:
        raise UsageError(
            f"{count} sequences of calibration data with held_out={held_out:g} leave nothing to fit on or to judge "
            "by; give at least two sequences and a fraction between 0 and 1"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def part(which: Tensor) -> Any:
        if not isinstance(batch, Mapping):
            return batch[which]
        return {key: value[which] if isinstance(value, Tensor) else value for key, value in batch.items()}

    longest = max(part.shape[1] if part.dim() > 1 else 1 for part in _tensors(batch))
    return part(order[judges:]), split(part(order[:judges]), max(1, TOKENS // longest))


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return [value for value in values if isinstance(value, Tensor)]


def _has_blocks(chosen: Iterable[Layer]) -> bool:
    return any(layer.block is not None for layer in chosen)


def _copy_(model: nn.Module, source: nn.Module, masks: Masks) -> None:
    """Take over every parameter; then the zeros once more, in case of shared memory."""
    parameters = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    masks.apply_(model)
