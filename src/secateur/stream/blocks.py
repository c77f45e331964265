"""What calibration data say, and what weight updates make of it, one decoder block at a time, resumable.

Statistics are those of the dense model, as `prune_` gathers them; updates meet the already pruned stream, as `mend_`
does it. Each block leaves a line in the journal and the hidden states behind it, so that a killed run goes on there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.statistics import STATISTICS, gather
from secateur.core.visit import merge
from secateur.core.where import Layer
from secateur.errors import NumericError
from secateur.manifest import STATE
from secateur.mend import mend_, update_statistics
from secateur.prune import Plan
from secateur.scoring import finite, score_of, seed_of
from secateur.stream.output import Output
from secateur.stream.shards import FLOATING
from secateur.stream.tensors import Work, keep_counts, prune_tensors, units_of, write_pruned
from secateur.stream.walk import Running, find_decoder, loaded_blocks, start

__all__ = ["prune_blocks"]

Hidden = list[Tensor]


def prune_blocks(work: Work, batches: Sequence[Any], output: Output, folder: Path) -> None:
    """Prune with calibration data and write every tensor.

    Cost: a read of all blocks and one forward pass for the statistics of the dense model, where the recipe has no
        update or its allocator wants scores; two forward passes of each block with an update.
    """
    find_decoder(work.model, work.todo.layers)
    statistics = cache(lambda: _statistics(work, batches, output, folder / STATE))
    if work.todo.recipe.update is None:
        statistics()
        prune_tensors(work, keep_counts(work, statistics), statistics, output)
        return
    counts = keep_counts(work, statistics)
    for unit in units_of(work):
        if unit not in work.layers and unit not in output.journal.done:
            output.copy(unit)
            output.finished(unit, None)
    output.flush()
    _mend(work, counts, batches, output, folder / STATE)


def _statistics(
    work: Work, batches: Sequence[Any], output: Output, state: Path
) -> dict[str, dict[str, Tensor]]:
    """The statistics of every layer's input in the dense model."""
    names = [name for name in work.todo.statistics if name in STATISTICS]

    def at(block: Running, number: int, layers: list[Layer], hidden: Hidden) -> dict[str, Any]:
        given = (block.batch(call, states) for call, states in enumerate(hidden))
        found = gather(block, layers, names, given)
        flat = {f"{layer}|{name}": value for layer, known in found.items() for name, value in known.items()}
        _save(state / f"statistics-{number}.safetensors", flat)
        return {}

    _walk(work, batches, output, state, "statistics", at)
    found: dict[str, dict[str, Tensor]] = {}
    for path in state.glob("statistics-*.safetensors"):
        for key, value in _load(path).items():
            layer, _, name = key.rpartition("|")
            found.setdefault(layer, {})[name] = value
    return found


def _mend(
    work: Work, counts: Mapping[str, Tensor], batches: Sequence[Any], output: Output, state: Path
) -> None:
    """Prune and update block by block."""
    recipe = work.todo.recipe
    wanted = {*work.todo.statistics, *update_statistics(recipe)}
    names = [name for name in STATISTICS if name in wanted]
    scores = _scores(work.todo, work.seed)

    def at(block: Running, number: int, layers: list[Layer], hidden: Hidden) -> dict[str, Any]:
        mended = mend_(block, layers, recipe, counts, names, [block.batch(0, hidden[0])], scores)
        for layer in layers:
            piece = work.places.pieces[layer.name][0]
            kind = FLOATING[work.places.shards.tensors[piece.name].kind]
            weight = layer.weight.detach().to(kind)
            found = write_pruned(work, layer, weight, mended.masks[layer.name], output)
            output.finished(layer.name, {**found, "damping": mended.damping[layer.name]})
        return {}

    _walk(work, [merge(batches)], output, state, "update", at)


def _scores(todo: Plan, seed: int) -> Callable[[Layer, int, Mapping[str, Tensor]], Tensor]:
    """The recipe's own score of one part of a layer, as `prune_` computes it."""

    def scores(layer: Layer, part: int, known: Mapping[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {name: known[name] for name in todo.statistics if name in known}
        if "generator" in todo.statistics:
            given["generator"] = torch.Generator().manual_seed(seed_of(seed, f"{layer.name}:{part}"))
        matrix = layer.layout.to_matrices(layer.weight.detach())[part].float()
        return score_of(todo, layer, matrix, given)

    return scores


At = Callable[[Running, int, list[Layer], Hidden], Mapping[str, Any]]


def _walk(work: Work, batches: Sequence[Any], output: Output, state: Path, what: str, at: At) -> None:
    """Call `at` for every block that holds a chosen layer, in order, up to the last such block.

    A block's line goes into the journal after the hidden states behind it are on the disk.
    """
    decoder = find_decoder(work.model, work.todo.layers)
    chosen = [decoder.layers_of(work.todo.layers, number) for number in range(len(decoder.blocks))]
    last = max(number for number, layers in enumerate(chosen) if layers)
    first = next((n for n in range(last + 1) if f"{what} of block {n}" not in output.journal.done), last + 1)
    if first > last:
        return
    work.tell("embedding the calibration data", 0, 1)
    hidden, calls = start(decoder, work.places, batches)
    if first:
        saved = _load(state / f"{what}-hidden-{first}.safetensors")
        hidden = [saved[str(call)] for call in range(len(batches))]
    for number, block in loaded_blocks(decoder, work.places, first):
        work.tell(f"{what} of the blocks", number, last + 1)
        running = Running(block, number, calls)
        _check(chosen[number])
        if chosen[number]:
            at(running, number, chosen[number], hidden)
        if number < last:
            hidden = running.results(hidden)
            _save(state / f"{what}-hidden-{number + 1}.safetensors", {str(c): h for c, h in enumerate(hidden)})
        output.finished(f"{what} of block {number}", None)
        output.flush()
        (state / f"{what}-hidden-{number}.safetensors").unlink(missing_ok=True)
        if number == last:
            break
    work.tell(f"{what} of the blocks", last + 1, last + 1)


def _check(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if not finite(layer.weight.detach()):
            raise NumericError(f"{layer.name}: NaN or Inf among its weights; it cannot be pruned")


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole or not at all."""
    from safetensors.torch import save_file

    beside = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}
