"""Input channels put in order for N:M from file to file: found block by block, and from then on part of every read.

The axes are those of the whole model, found on the meta device. A block's own are put in order while the dense stream
flows through it, as `permute_channels_` does it in memory; what comes out of the block must stay the same. Only the
orders are kept: `Places` puts tensors in order whenever it reads them, so pruning knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.channels import (
    Axis,
    Permuted,
    check_same,
    groups_of,
    orderable,
    put_in_order_,
    readers_of,
    reordered,
)
from secateur.checkpoint import Checkpoint
from secateur.core.statistics import STATISTICS, evaluating, forward, gather
from secateur.core.where import Layer
from secateur.errors import NumericError, UsageError
from secateur.stream.blocks import load, save, walk
from secateur.stream.memory import BASE, Need, told, walking_need
from secateur.stream.opened import LENGTH, analysed
from secateur.stream.output import Output
from secateur.stream.places import Order
from secateur.stream.tensors import Work
from secateur.stream.walk import Running, find_decoder

__all__ = ["Ordering", "put_in_order", "to_order"]

GROUPS = 512  # among which channels are assigned at a time; see `ordering.channel_order`
SCORE = 24  # bytes of work for each weight that reads an axis: its score, in order, sorted, and compared


@dataclass(frozen=True)
class Ordering:
    """Which channels are going to be put in order.

    Attributes:
        axes: by number of their block.
        left_out: axes and matrices whose order stays, each with the reason.
        batches: what flows meanwhile.
        need: the moment at which most memory is needed.
    """

    axes: dict[int, list[Axis]] = field(repr=False)
    left_out: tuple[tuple[str, str], ...]
    batches: list[Any] = field(repr=False)
    need: Need

    def __str__(self) -> str:
        return f"input channels of {sum(map(len, self.axes.values()))} axes, before pruning"


def to_order(
    checkpoint: Checkpoint, work: Work, batches: list[Any] | None, trust_remote_code: bool = False
) -> Ordering:
    """Find the axes that can be put in order, from headers alone.

    Args:
        checkpoint: the source.
        work: its recipe has an N:M.
        batches: calibration data; where the recipe needs none, a few tokens flow to see that the model stays the same.

    Raises:
        UsageError: a pattern that is no N:M, a model that cannot be exported or is no stack of blocks.
    """
    groups = groups_of(work.todo.recipe)
    if not hasattr(work.model, "config"):
        raise UsageError(
            f"{checkpoint.folder}: channels are put in order by following the model's computation, and transformers "
            "does not know this architecture; prune it without permute (--permute)"
        )
    decoder = find_decoder(work.model, work.todo.layers)
    work.tell("axes of the model", 0, 1)
    found, left = orderable(analysed(checkpoint, trust_remote_code).units, work.layers, groups.m)
    work.tell("axes of the model", 1, 1)
    axes: dict[int, list[Axis]] = {}
    for axis in found:
        at = {_block(member.name, decoder.path) for member in axis[0].members}
        number = at.pop()
        if at or number is None or not all(member.is_parameter for member in axis[0].members):
            left = (*left, (axis[0].name, "it runs through more than the matrices of one block"))
        else:
            axes.setdefault(number, []).append(axis)
    flowing = batches or [{"input_ids": (torch.arange(2 * LENGTH) % _words(work.model)).view(2, LENGTH)}]
    return Ordering(axes, left, flowing, _need(work, axes, flowing))


def put_in_order(work: Work, ordering: Ordering, output: Output, state: Path) -> tuple[Work, Permuted]:
    """Find the orders, block by block and resumable; work whose tensors are read in order, and what that gives.

    Cost: one forward pass, and for each axis a read of the matrices that read it and `ordering.channel_order`.
    """
    orders: dict[str, list[Order]] = {}
    kept: dict[str, tuple[float, float]] = {}
    if ordering.axes:
        last = max(ordering.axes)
        todo = replace(work.todo, layers=tuple(layer for n in range(last + 1) for layer in _of_block(work, n)))
        at = partial(_at, work, ordering, state)
        walk(replace(work, todo=todo), ordering.batches, output, state, "order", at)
    for number, axes in ordering.axes.items():
        known = load(_file(state, number))
        for place, (units, _) in enumerate(axes):
            kept[units.name] = (float(known[f"{place}|kept"][0]), float(known[f"{place}|kept"][1]))
            for member in units.members:
                orders.setdefault(member.name, []).append(
                    partial(reordered, dim=member.dim, indices=member.indices, order=known[f"{place}|order"])
                )
    return replace(work, places=replace(work.places, orders=orders)), Permuted(kept, ordering.left_out)


def _at(work: Work, ordering: Ordering, state: Path, block: Running, layers: list[Layer]) -> None:
    """Put one block's axes in order, and see that it computes what it did."""
    axes = ordering.axes.get(block.number, [])
    if not axes:
        return
    names = [name for name in work.todo.statistics if name in STATISTICS]
    known = gather(block, readers_of(axes), names, block) if names else {}
    if block.put is not None:
        block.give_on()  # the dense stream, before anything changes places
    first = next(iter(block))
    with block.silent(), evaluating(block):
        before = forward(block, first)
        kept, orders = put_in_order_(
            work.model, work.todo.recipe, axes, known, block=GROUPS, seed=work.seed, changed={}
        )
        try:
            check_same([before], [forward(block, first)])
        except NumericError as error:
            raise NumericError(f"block {block.number}: {error}") from None
    found: dict[str, Tensor] = {}
    for place, (pair, order) in enumerate(zip(kept.values(), orders, strict=True)):
        found |= {f"{place}|order": order, f"{place}|kept": torch.tensor(pair, dtype=torch.float64)}
    save(_file(state, block.number), found)


def _of_block(work: Work, number: int) -> list[Layer]:
    return find_decoder(work.model, work.todo.layers).layers_of(work.todo.layers, number)


def _file(state: Path, number: int) -> Path:
    return state / f"order-{number}.safetensors"


def _block(name: str, path: str) -> int | None:
    """The number of the block in which a parameter stands."""
    if not name.startswith(f"{path}."):
        return None
    return int(name.removeprefix(f"{path}.").partition(".")[0])


def _words(model: Any) -> int:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    return int(getattr(config, "vocab_size", 2))


def _need(work: Work, axes: dict[int, list[Axis]], batches: Sequence[Any]) -> Need:
    """The block that needs most, and the scores of its widest axis beside it."""
    read = [sum(layer.size for layer, _ in found) for group in axes.values() for _, found in group]
    walked = walking_need(
        replace(work, todo=replace(work.todo, recipe=replace(work.todo.recipe, update=None))), batches
    )
    size = walked.size + SCORE * max(read, default=0)
    return Need(
        size, f"putting channels in order ({told(size - BASE)} beside Python and torch)", "leave it out"
    )
