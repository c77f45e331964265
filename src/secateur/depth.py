"""Which blocks to take out: scores of blocks joined with the shape in which they are chosen.

A recipe for depth is written like any other, `Recipe(block_influence, pattern=Layers())`; the parameter names of
its score say what has to be known of every run of blocks.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.depth import Series, series, take_out_, without
from secateur.core.loss import Loss, loss_of
from secateur.core.passage import PASSAGES, passages
from secateur.core.stacks import Block, Stack
from secateur.core.statistics import evaluating
from secateur.deploy.twin import misfits
from secateur.errors import UsageError, nearest
from secateur.pattern import Layers
from secateur.recipes import Recipe, block_influence

__all__ = ["KNOWN", "choose_blocks", "needs_data"]

# what a score of blocks may ask for
KNOWN = (*PASSAGES, "loss_without", "position", "generator")


def choose_blocks(
    model: nn.Module,
    count: int,
    recipe: Recipe = block_influence,
    data: Iterable[Any] | None = None,
    *,
    stack: Stack | None = None,
    skip: Iterable[str] = (),
    loss: Loss | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """The blocks that a recipe would take out, by their paths; the model is left as it is.

    Every list of blocks keeps at least one. Blocks without which the model's config cannot describe it (the first
    one of T5, which holds the positions of all) are never chosen.

    Args:
        model: any model with repeated blocks.
        count: how many to take.
        recipe: `Recipe(score, pattern=Layers())` with a score of blocks, such as `block_influence`,
            `angular_distance`, `loss_without`; `Layers(together=True)` takes neighbours, `Layers(again=True)`
            one at a time.
        data: batches; scores by position need none.
        stack: "encoder" or "decoder"; None chooses from both where there are both.
        skip: globs of block paths that stay.
        loss: for `loss_without`, see `core.loss.loss_of`.
        seed: of random scores.

    Returns:
        Paths, in the order of the model; for `drop_blocks_`.

    Raises:
        UsageError: more blocks than may go, a recipe that is none for blocks, no data.

    Cost: one forward pass of the data (`count` with `again`); for `loss_without` one for each run of blocks. A
        model of transformers is built on the meta device to see whether its config can follow.
    """
    job = _Job(model, recipe, _names(recipe), None if data is None else _listed(data), loss, seed)
    fitted = not misfits(model)
    banned = {
        block.path
        for each in series(model)
        for block in each.blocks
        if stack not in (None, each.stack) or any(fnmatch.fnmatchcase(block.path, glob) for glob in skip)
    }
    while True:
        found = _choose(job, count, banned)
        culprits = _culprits(model, found) if fitted else []
        if not culprits:
            return tuple(block.path for block in found)
        banned |= {block.path for block in culprits}


@dataclass(frozen=True)
class _Job:
    """What does not change while blocks are chosen."""

    model: nn.Module
    recipe: Recipe
    names: tuple[str, ...]
    data: list[Any] | None
    loss: Loss | None
    seed: int

    @property
    def shape(self) -> Layers:
        """The shape in which blocks are chosen."""
        return self.recipe.pattern


def _names(recipe: Recipe) -> tuple[str, ...]:
    if not isinstance(recipe.pattern, Layers):
        raise UsageError(f"{recipe} cuts {recipe.pattern}, no blocks; expected a recipe on Layers()")
    names = tuple(inspect.signature(recipe.score).parameters)
    for name in names:
        if name not in KNOWN:
            raise UsageError(
                f"a score of blocks asks for {name!r}, which is not known of blocks; {nearest(name, KNOWN)}"
            )
    return names


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe for blocks looks at what they do; positions and random numbers need no data."""
    return bool({*PASSAGES, "loss_without"}.intersection(_names(recipe)))


def _listed(data: Iterable[Any]) -> list[Any]:
    if isinstance(data, Mapping):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    return list(data)


def _choose(job: _Job, count: int, banned: set[str]) -> list[Block]:
    lists = series(job.model)
    free = sum(
        min(len(each.blocks) - 1, sum(block.path not in banned for block in each.blocks)) for each in lists
    )
    if not 1 <= count <= free:
        raise UsageError(
            f"{count} blocks cannot be taken out; of {sum(len(each.blocks) for each in lists)} at most {free} may go"
        )
    if job.shape.together:
        return _run(job, lists, count, banned)
    gone: list[Block] = []
    for _ in range(count if job.shape.again else 1):
        gone += _lowest(job, lists, 1 if job.shape.again else count, banned, gone)
    taken = {block.path for block in gone}
    return [block for each in lists for block in each.blocks if block.path in taken]


def _lowest(
    job: _Job, lists: Sequence[Series], count: int, banned: set[str], gone: Sequence[Block]
) -> list[Block]:
    """The blocks with the lowest scores, in the model without those that are gone already."""
    known = {block.module: block for each in lists for block in each.blocks}
    with without(job.model, gone):
        left = series(job.model)
        scores = _scores(job, left, 1)
        ranked = sorted(
            (float(score), known[block.module].number, known[block.module], each.path)
            for each in left
            for block, score in zip(each.blocks, scores[each.path], strict=True)
            if score == score and known[block.module].path not in banned
        )
        room = {each.path: len(each.blocks) - 1 for each in left}
    found: list[Block] = []
    for _, _, block, path in ranked:
        if room[path] and len(found) < count:
            room[path] -= 1
            found.append(block)
    if len(found) < count:
        raise UsageError(f"only {len(found)} of the {count} blocks asked for hand the stream on in its shape")
    return found


def _run(job: _Job, lists: Sequence[Series], count: int, banned: set[str]) -> list[Block]:
    """The run of neighbours with the lowest score."""
    long = [each for each in lists if len(each.blocks) > count]
    scores = _scores(job, long, count)
    runs = [
        (float(score), each.blocks[start].number, list(each.blocks[start : start + count]))
        for each in long
        for start, score in enumerate(scores[each.path])
        if score == score and not banned & {block.path for block in each.blocks[start : start + count]}
    ]
    if not runs:
        raise UsageError(
            f"there are no {count} neighbours that may go; ask for fewer, or for blocks one by one"
        )
    return min(runs, key=lambda run: run[:2])[2]


def _scores(job: _Job, lists: Sequence[Series], span: int) -> dict[str, Tensor]:
    """Path of each list -> a score for each start of a run of blocks."""
    data = job.data
    if data is None and needs_data(job.recipe):
        raise UsageError(f"{job.recipe.describe()['score']} needs calibration data; pass data=")
    moved = passages(job.model, lists, data or (), span=span) if {*PASSAGES} & {*job.names} else {}
    generator = torch.Generator().manual_seed(job.seed)
    found = {}
    for each in lists:
        starts = range(len(each.blocks) - span + 1)
        known: dict[str, Any] = dict(moved.get(each.path, {}))
        known["position"] = torch.tensor([float(each.blocks[start].number) for start in starts])
        known["generator"] = generator
        if "loss_without" in job.names:
            losses = [_loss_without(job, each.blocks[start : start + span]) for start in starts]
            known["loss_without"] = torch.tensor(losses, dtype=torch.float64)
        found[each.path] = job.recipe.score(**{name: known[name] for name in job.names})
    return found


def _loss_without(job: _Job, blocks: Sequence[Block]) -> float:
    """The mean loss of the model without these blocks; NaN where it does not run or a list would lose all of them."""
    try:
        with without(job.model, blocks):
            return _loss(job)
    except (UsageError, RuntimeError):
        _loss(job)  # an error of the data or of the loss shows without any block missing, too
        return float("nan")


def _loss(job: _Job) -> float:
    total, weight = 0.0, 0
    with evaluating(job.model):
        for batch in job.data or ():
            value, count = loss_of(job.model, batch, job.loss)
            total, weight = total + float(value) * count, weight + count
    if not weight:
        raise UsageError("data holds no batch; scoring blocks by loss needs at least one")
    return total / weight


def _culprits(model: nn.Module, found: Sequence[Block]) -> list[Block]:
    """Blocks without which the config cannot describe the model; all of them where only the whole choice cannot."""
    if not _misfits_without(model, found):
        return []
    alone = [block for block in found if _misfits_without(model, [block])]
    return alone or list(found[-1:])


def _misfits_without(model: nn.Module, blocks: Sequence[Block]) -> tuple[str, ...]:
    edits = take_out_(model, blocks)
    try:
        return misfits(model)
    finally:
        edits.undo()
