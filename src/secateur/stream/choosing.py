"""choose_units: which heads, neurons, hidden dimensions of a checkpoint stay, its tensors read one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.checks import check_total
from secateur.core.gradients import GRADIENTS
from secateur.core.where import Layer, Only, layers
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.prune import Plan, plan
from secateur.recipes import Recipe, magnitude
from secateur.scoring import Statistics, candidates_of, kept_of, statistics_of
from secateur.stream.architecture import build_empty
from secateur.stream.blocks import Unwritten, statistics_of_blocks
from secateur.stream.job import _batches, needed_of_data
from secateur.stream.memory import Need, needed, parse_memory
from secateur.stream.opened import Opened, open_units
from secateur.stream.tensors import Work, holding, read_checked
from secateur.stream.walk import find_decoder
from secateur.structured import Target, counts_of
from secateur.target import check_arguments

__all__ = ["Choosing", "choose_units", "prepare_units"]


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Choosing:
    """Everything that is decided before a weight is read.

    Attributes:
        opened: the checkpoint.
        todo: what is cut, and how it is chosen.
        walked: the work of the forward pass; None where the score needs no data.
        batches: calibration data, None likewise.
        seed: of random scores.
        tell: progress.
        need: the moment at which most memory is needed.
    """

    opened: Opened
    todo: Plan
    walked: Work | None
    batches: list[Any] | None
    seed: int
    tell: Tell
    need: Need

    def kept(self, state: Path) -> dict[str, Tensor]:
        """The units that stay, by axis.

        Args:
            state: an empty folder for the hidden states between two blocks.

        Raises:
            NumericError: NaN or Inf among weights or inputs.
            UsageError: a target that cannot be reached.
        """
        known: Callable[[], Statistics] = cache(lambda: self._statistics(state))
        candidates = {
            site.name: candidates_of(
                self.todo.recipe, site, known, None, self.seed, zeros_last=False, around=self._reading
            )
            for site in self.todo.sites
        }
        counts = counts_of(self.opened.model, self.todo, candidates)
        check_total(self.todo, candidates, counts)
        return {
            name: kept_of(found, counts[name])[0].nonzero().flatten().cpu()
            for name, found in candidates.items()
        }

    def _statistics(self, state: Path) -> Statistics:
        if self.walked is None or self.batches is None:
            return {}
        return statistics_of_blocks(self.walked, self.batches, Unwritten(), state)

    @contextmanager
    def _reading(self, layer: Layer) -> Iterator[None]:
        self.tell(f"scores of {layer.name}", 0, 1)
        with holding(layer, read_checked(self.opened.places, layer)):
            yield


def choose_units(
    source: str | Path,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    target: str | Target | None = None,
    data: Iterable[Any] | None = None,
    only: Only = None,
    skip: Only = None,
    seed: int = 0,
    memory: str | int | None = None,
    tell: Tell = _silent,
) -> dict[str, Tensor]:
    """Which whole units of a checkpoint stay, without the model in memory: those that `prune_` would keep.

    `shrink_checkpoint(source, choose_units(source, ...), target)` takes the others out.

    Args:
        source: a local folder in Hugging Face format with safetensors files, of a model that reads tokens.
        sparsity, target, only, skip, seed: as for `prune_`; a target in parameters, MACs or bytes.
        recipe: its pattern cuts whole units; no gradients, and no update: what stays is mended afterwards.
        data: calibration batches, for scores of activations; the decoder's blocks are walked one by one.
        memory: how much may be used; a run that needs more is refused at once.
        tell: progress.

    Returns:
        Axis name -> indices of the units that stay.

    Raises:
        UsageError: see `prune_`; a score that needs gradients; a target in ms; a recipe that mends.
        InputError: the files are unsound.
        NumericError: NaN or Inf among weights or inputs.

    Cost: the export of the model, a read for the digests, one read of the matrices that the score looks at; with data
        one forward pass, block by block. Memory for the largest matrix, about 22 bytes a weight, or for a block.
    """
    found = prepare_units(
        open_units(source, tell), sparsity, recipe, target=target, data=data, only=only, skip=skip, seed=seed,
        memory=memory, tell=tell,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="secateur-") as state:
        return found.kept(Path(state))


def prepare_units(
    opened: Opened,
    sparsity: float | None = None,
    recipe: Recipe = magnitude,
    *,
    target: str | Target | None = None,
    data: Iterable[Any] | Callable[[Any], Iterable[Any]] | None = None,
    only: Only = None,
    skip: Only = None,
    seed: int = 0,
    memory: str | int | None = None,
    tell: Tell = _silent,
) -> Choosing:
    """Decide what `choose_units` would do, from headers alone; `data` may be a function of the model without values."""
    budget = parse_memory(memory)
    check_arguments(sparsity, recipe, None)
    if not hasattr(recipe.pattern, "sites"):
        raise UsageError(
            f"{recipe.pattern!r} cuts no whole units; choose a pattern such as Heads() | Neurons()"
        )
    wanted = Target.read(target, recipe, sparsity, None)
    if wanted is not None and wanted.quantity == "ms":
        raise UsageError("a target in ms is measured on the whole model; choose parameters, macs or MB")
    if recipe.update is not None:
        raise UsageError(
            f"{recipe.update!r} mends what stays on the model in memory, which is not there; leave it out "
            "(update=None, --mend none), and mend or fine-tune the small model"
        )
    asks = statistics_of(recipe.score)
    if slopes := [name for name in asks if name in GRADIENTS]:
        raise UsageError(
            f"{recipe} needs {', '.join(slopes)}, and gradients need the whole model in memory; choose a score of "
            "weights, such as l2, or of activations, such as flap"
        )
    if data is None and (missing := [name for name in asks if name != "generator"]):
        raise UsageError(f"{recipe} needs calibration data for {', '.join(missing)}; pass data=")
    tell("axes of the model", 0, 1)
    todo = plan(opened.model, sparsity, recipe, target=target, only=only, skip=skip, example=opened.example)
    tell("axes of the model", 1, 1)
    opened.places.check(layer.name for layer in todo.layers)
    names = needed_of_data(todo)
    work = Work(opened.model, todo, opened.places, None, seed, tell, budget)
    batches, walked = None, None
    if names:
        walked = _walked(opened, work)
        given = data(walked.model) if callable(data) else data
        batches = _batches(todo, names, given)
    need = needed(walked or work, batches)
    need.check(budget)
    return Choosing(opened, todo, walked, batches, seed, tell, need)


def _walked(opened: Opened, work: Work) -> Work:
    """The same layers in a model whose buffers have values, so that its blocks can be run."""
    model = build_empty(opened.checkpoint, opened.places.shards).model
    known = {layer.name: layer for layer in layers(model)}
    mine = tuple(known[layer.name] for layer in work.todo.layers)
    find_decoder(model, mine)
    opened.places.check(dict(model.named_parameters()))
    return replace(work, model=model, todo=replace(work.todo, layers=mine))
