"""What calibration data say, and what weight updates make of it, one decoder block at a time, resumable.

Statistics are those of the dense model, as `prune_` gathers them; updates meet the already pruned stream, as `mend_`
does it. Each block leaves a line in the journal and the hidden states behind it, so that a killed run goes on there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checks import bias_name, check_nonzero
from secateur.core.statistics import STATISTICS, gather
from secateur.core.visit import visit
from secateur.core.where import Layer
from secateur.errors import InputError, NumericError
from secateur.manifest import STATE
from secateur.mend import mend_, own_biases, update_statistics
from secateur.prune import Plan
from secateur.scoring import finite, score_of, seed_of
from secateur.stream.hidden import Hidden, write_hidden
from secateur.stream.journal import ANEW
from secateur.stream.memory import check_calls
from secateur.stream.output import Output
from secateur.stream.stages import in_parts, visit_in_stages
from secateur.stream.tensors import Work, carry_over, keep_counts, prune_tensors, units_of, write_pruned
from secateur.stream.walk import Call, Decoder, Running, find_decoder, loaded_blocks, start

__all__ = ["Unwritten", "load", "prune_blocks", "save", "statistics_of_blocks", "walk"]


class Unwritten:
    """Takes the place of `Output` where blocks are walked and nothing is written: nobody goes on from it."""

    def __init__(self) -> None:
        self.done: dict[str, Any] = {}

    @property
    def journal(self) -> Unwritten:
        """Says which blocks are behind."""
        return self

    def finished(self, unit: str, found: Any) -> None:
        """A block is behind."""
        self.done[unit] = found

    def flush(self) -> None:
        """Nothing to write."""


def prune_blocks(work: Work, batches: Sequence[Any], output: Output, folder: Path) -> None:
    """Prune with calibration data and write every tensor.

    Cost: a read of all blocks and one forward pass for the statistics of the dense model, where the recipe has no
        update or its allocator wants scores; with an update one forward pass of each block, or, where the
        data come in parts, one for each of its stages and one more.
    """
    find_decoder(work.model, work.todo.layers)
    statistics = cache(lambda: statistics_of_blocks(work, batches, output, folder / STATE))
    if work.todo.recipe.update is None:
        statistics()
        prune_tensors(work, keep_counts(work, statistics), statistics, output)
        return
    counts = keep_counts(work, statistics)
    for unit in units_of(work):
        if unit not in work.layers and unit not in output.journal.done:
            carry_over(work, unit, output)
            output.finished(unit, None)
    output.flush()
    _mend(work, counts, batches, output, folder / STATE)


def statistics_of_blocks(
    work: Work, batches: Sequence[Any], output: Output | Unwritten, state: Path
) -> dict[str, dict[str, Tensor]]:
    """The statistics of every layer's input in the dense model.

    Args:
        work: whose layers all stand in the decoder's blocks.
        batches: calibration data.
        output: hears of finished blocks.
        state: a folder for hidden states and for what was found.
    """
    names = [name for name in work.todo.statistics if name in STATISTICS]

    def at(block: Running, layers: list[Layer]) -> None:
        found = gather(block, layers, names, block)
        flat = {f"{layer}|{name}": value for layer, known in found.items() for name, value in known.items()}
        save(state / f"statistics-{block.number}.safetensors", flat)

    walk(work, batches, output, state, "statistics", at)
    found: dict[str, dict[str, Tensor]] = {}
    for path in state.glob("statistics-*.safetensors"):
        for key, value in load(path).items():
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
    parts = in_parts(batches)

    def at(block: Running, layers: list[Layer]) -> None:
        whole = partial(visit, to_the_end=block.put is not None)
        visiting: Any = whole if len(parts) == 1 else visit_in_stages
        mended = mend_(block, layers, recipe, counts, names, block, scores, visiting)
        biases = own_biases(block, layers)
        for layer in layers:
            mask = mended.masks[layer.name]
            if work.nonzero is not None:
                check_nonzero({layer.name: layer.weight}, {layer.name: mask}, work.nonzero)
            weight = layer.weight.detach().to(work.places.kind(layer.name))
            found = write_pruned(work, layer, weight, mask, output)
            if layer.name in biases:
                _write_changed(work, bias_name(layer), biases[layer.name].detach(), output)
            output.finished(layer.name, {**found, "damping": mended.damping[layer.name]})

    walk(work, parts, output, state, "update", at)


def _write_changed(work: Work, name: str, values: Tensor, output: Output) -> None:
    """Write a bias that took over what weights lost; one that did not is there already."""
    values = values.to(work.places.kind(name))
    if not torch.equal(values, work.places.read(name)):
        for stored, part in work.places.parts(name, values):
            output.write(stored, part)


def _scores(todo: Plan, seed: int) -> Callable[[Layer, int, Mapping[str, Tensor]], Tensor]:
    """The recipe's own score of one part of a layer, as `prune_` computes it."""

    def scores(layer: Layer, part: int, known: Mapping[str, Tensor]) -> Tensor:
        given: dict[str, Any] = {name: known[name] for name in todo.statistics if name in known}
        if "generator" in todo.statistics:
            given["generator"] = torch.Generator().manual_seed(seed_of(seed, f"{layer.name}:{part}"))
        matrix = layer.layout.to_matrices(layer.weight.detach())[part].float()
        return score_of(todo.recipe, layer, matrix, given)

    return scores


At = Callable[[Running, list[Layer]], None]


def walk(
    work: Work, batches: Sequence[Any], output: Output | Unwritten, state: Path, what: str, at: At
) -> None:
    """Call `at` for every block that holds a chosen layer, in order, up to the last such block.

    A block's line goes into the journal after the hidden states behind it are on the disk.
    """
    decoder = find_decoder(work.model, work.todo.layers)
    chosen = [decoder.layers_of(work.todo.layers, number) for number in range(len(decoder.blocks))]
    last = max(number for number, layers in enumerate(chosen) if layers)
    first = next((n for n in range(last + 1) if f"{what} of block {n}" not in output.journal.done), last + 1)
    if first > last:
        return
    calls = _embedded(work, decoder, batches, _hidden(state, what, 0), first)
    shapes, label = [call.shape for call in calls], f"{what} of the blocks"
    with closing(loaded_blocks(decoder, work.places, first, last)) as blocks:
        for number, block in blocks:
            work.tell(label, number - first, last + 1 - first)
            _check(chosen[number])
            running = Running(block, number, calls, Hidden(_hidden(state, what, number), shapes))
            with ExitStack() as stack:
                if number < last:
                    running.put = stack.enter_context(write_hidden(_hidden(state, what, number + 1)))
                if chosen[number]:
                    at(running, chosen[number])
                if number < last:
                    running.give_on()
            output.finished(f"{what} of block {number}", None)
            output.flush()
            _hidden(state, what, number).unlink()
    work.tell(label, last + 1 - first, last + 1 - first)


def _hidden(state: Path, what: str, number: int) -> Path:
    """The hidden states before a block."""
    return state / f"{what}-hidden-{number}.bin"


def _embedded(work: Work, decoder: Decoder, batches: Sequence[Any], path: Path, first: int) -> list[Call]:
    """The calls of all blocks; the hidden states before the first block go to the file, unless it is behind us."""
    label = "embedding the calibration data"
    work.tell(label, 0, 1)
    if first:
        calls = start(decoder, work.places, batches, lambda states: None)
    else:
        with write_hidden(path) as put:
            calls = start(decoder, work.places, batches, put)
    work.tell(label, 1, 1)
    check_calls(calls, work.budget)
    return calls


def _check(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if not finite(layer.weight.detach()):
            raise NumericError(f"{layer.name}: NaN or Inf among its weights; it cannot be pruned")


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole or not at all."""
    from safetensors.torch import save

    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: Path) -> dict[str, Tensor]:
    """What `save` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise InputError(f"{path}: not readable ({error}); {ANEW}") from error
