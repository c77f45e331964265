"""prune_checkpoint: plan from headers, prune from file to file, resume where a killed run stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import Checkpoint
from secateur.core.gradients import GRADIENTS
from secateur.core.site import LayerSite
from secateur.core.where import Only, select
from secateur.errors import InputError, NumericError, UsageError
from secateur.folder import new_folder
from secateur.manifest import STATE
from secateur.measure import Tell
from secateur.mend import update_statistics
from secateur.prune import Plan, plan
from secateur.recipes import Recipe, magnitude
from secateur.results import layer_lines
from secateur.run import check_apart
from secateur.scoring import statistics_of
from secateur.stream.architecture import build_empty
from secateur.stream.blocks import prune_blocks
from secateur.stream.journal import Journal
from secateur.stream.memory import Need, needed, parse_memory, tokens_of, told
from secateur.stream.opened import read_source
from secateur.stream.output import Output
from secateur.stream.permuting import Ordering, put_in_order, to_order
from secateur.stream.places import find_places
from secateur.stream.shards import open_shards
from secateur.stream.summary import copied_files, facts_of, write_summary
from secateur.stream.tensors import Work, count_nonzeros, keep_counts, prune_tensors, weights_to_keep
from secateur.stream.walk import find_decoder
from secateur.target import check_arguments, shape_of

__all__ = [
    "Outcome",
    "Prepared",
    "carry_out",
    "prepare",
    "prune_checkpoint",
]


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Outcome:
    """What was written.

    Attributes:
        folder: the pruned checkpoint.
        plan: what was pruned.
        size: weights in the pruned layers.
        pruned: how many of them the masks prune.
        notes: sentences that a reader needs.
    """

    folder: Path
    plan: Plan
    size: int
    pruned: int
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Pruned weights as a fraction of all weights in the pruned layers."""
        return self.pruned / self.size

    def __str__(self) -> str:
        return f"{self.folder}: {self.pruned:,} of {self.size:,} weights pruned, sparsity {self.sparsity:.4f}"


@dataclass(frozen=True)
class Prepared:
    """Everything that is decided before a weight is read.

    Attributes:
        checkpoint: the source.
        work: what is pruned and how.
        batches: calibration data, None where the recipe needs none.
        need: the moment at which most memory is needed.
        notes: sentences that a reader needs.
        ordering: channels to be put in order first, None where that was not asked for.
    """

    checkpoint: Checkpoint
    work: Work
    batches: list[Any] | None
    need: Need
    notes: tuple[str, ...] = ()
    ordering: Ordering | None = None

    def __str__(self) -> str:
        shards = self.work.places.shards
        total, files = sum(shards.sizes.values()), len(shards.sizes)
        lines = [f"model    {self.checkpoint.folder}, {told(total)} in {files} file{'s' * (files != 1)}"]
        lines.append(f"prune    {self.work.todo}")
        if self.ordering is not None:
            lines.append(f"order    {self.ordering}")
        if self.batches is not None:
            lines.append(f"data     {len(self.batches)} batches, {sum(map(tokens_of, self.batches)):,} tokens")
        lines.append(f"memory   {self.need}")
        lines.append(f"disk     {told(total + self.work.todo.size / 8)}")
        lines += [f"leave    {line}" for line in layer_lines(self.work.todo)]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    nonzero: int | None = None,
    data: Iterable[Any] | None = None,
    only: Only = None,
    skip: Only = None,
    permute: bool = False,
    if_exists: str = "fail",
    seed: int = 0,
    memory: str | int | None = None,
    trust_remote_code: bool = False,
    tell: Tell = _silent,
) -> Outcome:
    """Prune a checkpoint that need not fit in memory: the same masks and weights as `prune_` and save would give.

    Recipes without data work a tensor at a time, for any architecture; recipes with data walk the blocks of a
    language model one by one and keep only the hidden states between two blocks, on the disk. Bit by bit the
    result is that of `prune_`, except where a weight update has more than 8,192 calibration tokens: those
    come in parts then, whose matrix products round otherwise.

    Args:
        source: folder with config.json and safetensors files; never written to.
        target: folder to write; it appears when everything is in it.
        permute: for N:M, first put the input channels of each block into the order in which it keeps most of the
            recipe's score; see `permute_channels_`.
        sparsity, recipe, nonzero, data, only, skip, seed: as for `prune_`.
        if_exists: "fail", "overwrite", or "resume": go on where a run with the same arguments was killed, to the
            same bytes.
        memory: how much may be used, such as "16 GB" or bytes; a run that needs more is refused at once.
        trust_remote_code: run Python files of the source where its config asks for that.
        tell: called with a label, steps done and steps in all.

    Returns:
        What was written. Masks are in run/masks.safetensors, one bit a weight.

    Raises:
        UsageError: see `prune_`; a resume with other arguments; an architecture that cannot be walked.
        InputError: a missing, truncated or unfitting file.
        NumericError: NaN or Inf in a layer or its inputs.
        ResourceError: disk or memory is too small; what was done is kept for "resume".

    Cost: one read for the digests, one for writing, about two more for `globally`; with data, one for the forward
        pass. Memory for the largest tensor (about 14 bytes a weight), or for one block, its successor, and
        the weight update of its widest layer.
    """
    check_arguments(sparsity, recipe, nonzero)
    check_apart(str(source), target)
    with new_folder(target, if_exists) as folder:
        prepared = prepare(
            read_source(source, tell), sparsity, recipe, nonzero=nonzero, data=data, only=only, skip=skip,
            permute=permute, seed=seed, memory=memory, trust_remote_code=trust_remote_code, tell=tell,
        )  # fmt: skip
        return replace(carry_out(prepared, folder), folder=Path(target))


def prepare(
    checkpoint: Checkpoint,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    nonzero: int | None = None,
    data: Iterable[Any] | Callable[[Any], Iterable[Any]] | None = None,
    only: Only = None,
    skip: Only = None,
    permute: bool = False,
    seed: int = 0,
    memory: str | int | None = None,
    trust_remote_code: bool = False,
    tell: Tell = _silent,
) -> Prepared:
    """Decide what `prune_checkpoint` would do, from headers alone; an exact number of non-zeros costs one read.

    Args:
        data: as in `prune_checkpoint`; or a function that gets the model, without values, and gives the data, called
            only where the recipe needs some.
    """
    budget = parse_memory(memory)
    if hasattr(recipe.pattern, "sites"):
        raise UsageError(
            f"{recipe.pattern!r} cuts whole units, which run through several tensors; choose them with choose_units "
            "and take them out with shrink_checkpoint (secateur prune --stream --shrink)"
        )
    shards = open_shards(checkpoint)
    architecture = build_empty(checkpoint, shards, trust_remote_code=trust_remote_code)
    places = find_places(architecture, shards)
    model = architecture.model
    places.check(layer.name for layer in select(model, only, skip).chosen)
    if nonzero is None:
        todo = plan(model, sparsity, recipe, only=only, skip=skip)
    else:
        todo = _plan_of_nonzero(model, places, sparsity, recipe, nonzero, only, skip)
    if slopes := [name for name in todo.statistics if name in GRADIENTS]:
        raise UsageError(
            f"{todo.recipe} needs {', '.join(slopes)}, and gradients need the whole model in memory; load it and use "
            "prune_, or choose a score of activations"
        )
    work = Work(model, todo, places, nonzero, seed, tell, budget)
    names = needed_of_data(todo)
    if names and not architecture.known:
        raise UsageError(
            f"{checkpoint.folder}: {todo.recipe} needs the model to run, but {architecture.note.split(', so')[0]}; "
            "choose a recipe without data, such as magnitude"
        )
    batches = None
    if names:
        find_decoder(model, todo.layers)
        places.check(dict(model.named_parameters()))
        batches = _batches(todo, names, data(model) if callable(data) else data)
    ordering = to_order(checkpoint, work, batches, trust_remote_code) if permute else None
    needs = [needed(work, batches), *([ordering.need] if ordering is not None else [])]
    need = max(needs, key=lambda each: each.size)
    need.check(budget)
    notes = (architecture.note,) if architecture.note else ()
    return Prepared(checkpoint, work, batches, need, notes, ordering)


def needed_of_data(todo: Plan) -> list[str]:
    """What calibration data have to say; empty where a recipe needs none."""
    return [name for name in (*todo.statistics, *update_statistics(todo.recipe)) if name != "generator"]


def carry_out(
    prepared: Prepared,
    folder: Path,
    asked: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Prune into `folder`, which `new_folder` gave, from where an interrupted run left it.

    Args:
        asked: the caller's own words: kept for `asked_before` until the run is finished, then run/recipe.yaml.
        settings: the same with every default, for run/recipe.resolved.yaml.
    """
    work, checkpoint, notes = prepared.work, prepared.checkpoint, prepared.notes
    facts = facts_of(checkpoint, work, prepared.batches) | {"permute": prepared.ordering is not None}
    journal = Journal(folder, facts, asked)
    with _state_dropped_when_hopeless(folder):
        shapes = {layer.name: tuple(layer.weight.shape) for layer in work.todo.layers}
        output = Output(folder, work.places.shards, shapes, journal)
        try:
            if prepared.ordering is not None:
                work, order = put_in_order(work, prepared.ordering, output, folder / STATE)
                notes = (*notes, order.told.rstrip("."))
            if prepared.batches is None:
                prune_tensors(work, keep_counts(work, dict), dict, output)
            else:
                prune_blocks(work, prepared.batches, output, folder)
        finally:
            output.close()
        copied_files(checkpoint, folder)
        pruned = write_summary(checkpoint, work, journal, folder, notes, settings)
    return Outcome(folder, work.todo, work.todo.size, pruned, notes)


def _plan_of_nonzero(
    model: Any,
    places: Any,
    sparsity: float | None,
    recipe: Recipe,
    nonzero: int,
    only: Only,
    skip: Only,
) -> Plan:
    if sparsity is not None or recipe.fixed_by_pattern or getattr(recipe.allocate, "decides", False):
        raise UsageError(
            "nonzero fixes the count; give it without a sparsity and with a recipe that can follow it"
        )
    selection = select(model, only, skip)
    for layer in selection.chosen:
        shape = shape_of(recipe, layer)
        if layer.size != shape[0] * shape[1]:
            raise UsageError(
                f"an exact number of non-zeros needs single weights as units, got {recipe.pattern}"
            )
    update_statistics(recipe)
    own, others = count_nonzeros(model, places, selection.chosen)
    keep = weights_to_keep(own, others, nonzero)
    sites = tuple(LayerSite(layer, recipe.pattern, shape_of(recipe, layer)) for layer in selection.chosen)
    statistics, computed = statistics_of(recipe.score), selection.unprunable
    return Plan(recipe, selection.chosen, selection.left_out, keep, statistics, sites, unprunable=computed)


def _batches(todo: Plan, names: list[str], data: Iterable[Any] | None) -> list[Any]:
    if data is None:
        raise UsageError(f"{todo.recipe} needs calibration data for {', '.join(names)}; pass data=")
    if isinstance(data, Mapping | torch.Tensor):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    batches = list(data)
    if not batches:
        raise UsageError("data holds no batch; calibration needs at least one")
    return batches


class _state_dropped_when_hopeless:  # noqa: N801 - reads as a sentence
    """An error that a resume would only meet again leaves nothing behind."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Drop the state of a run that cannot go on."""
        if isinstance(error, UsageError | InputError | NumericError):
            shutil.rmtree(self.folder / STATE, ignore_errors=True)
