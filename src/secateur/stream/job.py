"""prune_checkpoint: plan from headers, prune from file to file, resume where a killed run stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import Checkpoint, read_checkpoint
from secateur.core.gradients import GRADIENTS
from secateur.core.where import Only, select
from secateur.errors import InputError, NumericError, ResourceError, UsageError
from secateur.folder import interrupted, new_folder
from secateur.manifest import STATE
from secateur.measure import Tell
from secateur.mend import update_statistics
from secateur.prune import Plan, plan
from secateur.recipes import Recipe, magnitude
from secateur.run import check_apart
from secateur.scoring import statistics_of
from secateur.stream.architecture import build_empty
from secateur.stream.blocks import prune_blocks
from secateur.stream.output import Journal, Output
from secateur.stream.places import find_places
from secateur.stream.shards import open_shards
from secateur.stream.summary import copied_files, facts_of, write_summary
from secateur.stream.tensors import Work, count_nonzeros, keep_counts, prune_tensors, weights_to_keep
from secateur.stream.walk import find_decoder
from secateur.target import check_arguments, shape_of

__all__ = ["Outcome", "asked_before", "prune_checkpoint"]

_WEIGHT = 14  # bytes of work for each weight of the largest layer: as stored, float32, scores, marks
_BASE = 700 << 20  # bytes of Python, torch and transformers
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


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
    if_exists: str = "fail",
    seed: int = 0,
    memory: str | int | None = None,
    trust_remote_code: bool = False,
    asked: Mapping[str, Any] | None = None,
    tell: Tell = _silent,
) -> Outcome:
    """Prune a checkpoint that need not fit in memory: the same masks and weights as `prune_` and save would give.

    Recipes without data work a tensor at a time, for any architecture; recipes with data walk the decoder
    blocks of a language model one by one and keep only the hidden states between two blocks.

    Args:
        source: folder with config.json and safetensors files; never written to.
        target: folder to write; it appears when everything is in it.
        sparsity, recipe, nonzero, data, only, skip, seed: as for `prune_`.
        if_exists: "fail", "overwrite", or "resume": go on where a run with the same arguments was killed, to the
            same bytes.
        memory: how much may be used, such as "16 GB" or bytes; a layer that needs more is refused at once.
        trust_remote_code: run Python files of the source where its config asks for that.
        asked: the caller's own words, kept for `asked_before` until the run is finished.
        tell: called with a label, steps done and steps in all.

    Returns:
        What was written. Masks are in run/masks.safetensors, one bit a weight.

    Raises:
        UsageError: see `prune_`; a resume with other arguments; an architecture that cannot be walked.
        InputError: a missing, truncated or unfitting file.
        NumericError: NaN or Inf in a layer or its inputs.
        ResourceError: disk or memory is too small; what was done is kept for "resume".

    Cost: one read for the digests, one for writing, about two more for `globally`; with data, one for each forward
        pass. Memory for the largest tensor (about 14 bytes a weight) or one decoder block.
    """
    check_arguments(sparsity, recipe, nonzero)
    check_apart(str(source), target)
    budget = parse_memory(memory)
    with new_folder(target, if_exists) as folder:
        tell("reading the checkpoint", 0, 1)
        checkpoint = read_checkpoint(_folder(source))
        work, notes = _prepared(
            checkpoint, sparsity, recipe, nonzero, only, skip, seed, trust_remote_code, tell
        )
        tell("reading the checkpoint", 1, 1)
        _check_memory(work, budget)
        needs_data = bool(recipe.update) or any(name != "generator" for name in work.todo.statistics)
        batches = _batches(work, data) if needs_data else None
        if batches is not None:
            find_decoder(work.model, work.todo.layers)
        journal = Journal(folder, facts_of(checkpoint, work, batches), asked)
        with _state_dropped_when_hopeless(folder):
            shapes = {layer.name: tuple(layer.weight.shape) for layer in work.todo.layers}
            output = Output(folder, work.places.shards, shapes, journal)
            try:
                _carry_out(work, batches, output, folder)
            finally:
                output.close()
            copied_files(checkpoint, folder)
            pruned = write_summary(checkpoint, work, journal, folder, notes, asked)
    return Outcome(Path(target), work.todo, work.todo.size, pruned, tuple(notes))


def asked_before(target: str | Path) -> dict[str, Any] | None:
    """What a run of `target` that was interrupted was asked, as given in `asked`; None where none was."""
    folder = interrupted(target)
    path = None if folder is None else folder / STATE / "asked.json"
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path}: not readable as JSON; start anew with --if-exists overwrite") from None
    return found if isinstance(found, dict) else None


def parse_memory(memory: str | int | None) -> int | None:
    """An amount of memory in bytes.

    Example:
        >>> parse_memory("16 GB"), parse_memory("1.5GiB"), parse_memory(None)
        (16000000000, 1610612736, None)
    """
    if memory is None or (isinstance(memory, int) and memory > 0):
        return memory
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(memory).strip().lower())
    if found is None or found[2] not in _UNITS:
        raise UsageError(f'memory is {memory!r}; expected an amount such as "16 GB" or "900 MiB"')
    return int(float(found[1]) * _UNITS[found[2]])


def _folder(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; streaming needs a local folder with safetensors files")
    return path


def _prepared(
    checkpoint: Checkpoint,
    sparsity: float | None,
    recipe: Recipe,
    nonzero: int | None,
    only: Only,
    skip: Only,
    seed: int,
    trust_remote_code: bool,
    tell: Tell,
) -> tuple[Work, list[str]]:
    """The plan, from headers alone; an exact number of non-zeros costs one read."""
    shards = open_shards(checkpoint)
    architecture = build_empty(checkpoint, shards, trust_remote_code=trust_remote_code)
    places = find_places(architecture, shards)
    model, notes = architecture.model, [architecture.note] if architecture.note else []
    chosen = select(model, only, skip).chosen
    places.check(layer.name for layer in chosen)
    if nonzero is None:
        todo = plan(model, sparsity, recipe, only=only, skip=skip)
    else:
        todo = _plan_of_nonzero(architecture.model, places, sparsity, recipe, nonzero, only, skip)
    if slopes := [name for name in todo.statistics if name in GRADIENTS]:
        raise UsageError(
            f"{todo.recipe} needs {', '.join(slopes)}, and gradients need the whole model in memory; load it and use "
            "prune_, or choose a score of activations"
        )
    if recipe.update is not None or set(todo.statistics) - {"generator"}:
        if not architecture.known:
            raise UsageError(
                f"{checkpoint.folder}: {todo.recipe} needs the model to run, but {notes[0].split(', so')[0]}; "
                "choose a recipe without data, such as magnitude"
            )
        places.check(dict(model.named_parameters()))
    return Work(model, todo, places, nonzero, seed, tell), notes


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
    return Plan(recipe, selection.chosen, selection.left_out, keep, statistics_of(recipe.score))


def _check_memory(work: Work, budget: int | None) -> None:
    largest = max(work.todo.layers, key=lambda layer: layer.size)
    need = _BASE + _WEIGHT * largest.size
    if budget is not None and need > budget:
        raise ResourceError(
            f"{largest.name}: pruning its {largest.size:,} weights takes about {need / 1e9:.1f} GB, more than the "
            f'{budget / 1e9:.1f} GB allowed. Allow more, or skip it with skip="{largest.path}"'
        )


def _batches(work: Work, data: Iterable[Any] | None) -> list[Any]:
    names = [
        name for name in (*work.todo.statistics, *update_statistics(work.todo.recipe)) if name != "generator"
    ]
    if data is None:
        raise UsageError(f"{work.todo.recipe} needs calibration data for {', '.join(names)}; pass data=")
    if isinstance(data, Mapping | torch.Tensor):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    batches = list(data)
    if not batches:
        raise UsageError("data holds no batch; calibration needs at least one")
    return batches


def _carry_out(work: Work, batches: list[Any] | None, output: Output, folder: Path) -> None:
    if batches is not None:
        prune_blocks(work, batches, output, folder)
        return
    counts = keep_counts(work, dict)
    prune_tensors(work, counts, dict, output)


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
