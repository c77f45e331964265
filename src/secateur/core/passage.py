"""What repeated blocks do to the stream that runs through them: input and output compared, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.depth import Series
from secateur.core.matrix import layouts
from secateur.core.stacks import Block
from secateur.core.statistics import Padding, evaluating, forward
from secateur.errors import NumericError, UsageError

__all__ = ["PASSAGES", "hidden", "passages"]

# name -> what a token adds, from the cosine of what goes in and what comes out
PASSAGES: Mapping[str, Any] = {
    # mean cosine similarity
    "cosine": lambda cosine: cosine,
    # mean angle, as a share of a half turn: in [0, 1]
    "angle": lambda cosine: cosine.clamp(-1, 1).acos() / pi,
}


@dataclass
class _Run:
    """A list of blocks while the data run through it."""

    each: Series
    span: int
    inputs: dict[int, Tensor]  # position -> what went in, of the blocks whose span is not over
    totals: dict[str, list[float]]
    tokens: list[int]
    reshaped: set[int]  # starts of spans that change the shape


def passages(
    model: nn.Module, lists: Iterable[Series], data: Iterable[Any], *, span: int = 1
) -> dict[str, dict[str, Float[Tensor, " start"]]]:
    """Compare what enters each run of `span` consecutive blocks with what leaves it.

    Args:
        model: any model.
        lists: lists of blocks with at least `span` blocks; shorter ones are left out.
        data: batches, as for pruning; padding is not counted.
        span: blocks in a run.

    Returns:
        Path of the list -> name of `PASSAGES` -> mean over all real tokens for each start of a run, NaN where
        a run changes the shape of the stream. A token is a position of a sequence or of an image.

    Raises:
        UsageError: no data, a block that the data never reach, or that is used several times in one pass.
        NumericError: NaN or Inf in the stream.

    Cost: one forward pass, and memory for the inputs of `span` blocks.
    """
    if isinstance(data, Mapping):
        raise UsageError("data is one batch; expected an iterable of batches, such as [batch]")
    runs = []
    for each in lists:
        starts = len(each.blocks) - span + 1
        if starts > 0:
            totals = {name: [0.0] * starts for name in PASSAGES}
            runs.append(_Run(each, span, {}, totals, [0] * starts, set()))
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        padding = Padding(model, stack)
        for run in runs:
            _watch(run, padding, stack)
        for batch in data:
            batches += 1
            padding.look_at(batch)
            forward(model, batch)
            for run in runs:
                run.inputs.clear()
    if batches == 0:
        raise UsageError("data holds no batch; comparing blocks needs at least one")
    return {run.each.path: _means(run) for run in runs}


def _watch(run: _Run, padding: Padding, stack: ExitStack) -> None:
    for position, block in enumerate(run.each.blocks):
        before = partial(_enter, run, position)
        after = partial(_leave, run, position, padding)
        stack.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(block.module.register_forward_hook(after).remove)


def _enter(run: _Run, position: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if position in run.inputs:
        raise UsageError(
            f"{run.each.blocks[position].path} is used several times in one pass, so it is no layer of depth"
        )
    run.inputs[position] = hidden(args, kwargs)


def _leave(run: _Run, position: int, padding: Padding, module: nn.Module, args: tuple, output: Any) -> None:
    start = position - run.span + 1
    if start < 0:
        return
    block, after = run.each.blocks[start], hidden((output,))
    before = run.inputs[start]
    if before.shape != after.shape:
        run.reshaped.add(start)
        return
    cosine = _cosine(block, before, after, padding)
    if not bool(cosine.isfinite().all()):
        raise NumericError(f"{block.path}: NaN or Inf in what it reads or writes; look at the data")
    run.tokens[start] += cosine.numel()
    for name, add in PASSAGES.items():
        run.totals[name][start] += float(add(cosine).sum())


def hidden(args: Any, kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """The stream in what a block is given or gives back: the first tensor."""
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, Tensor):
            return value
        if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
            return value[0]
    raise UsageError("a block is given or gives no tensor, so what it does to the stream cannot be told")


@dataclass(frozen=True)
class _Seen:
    """A block, as far as telling padding needs to know it."""

    name: str
    module: nn.Module


def _cosine(block: Block, before: Tensor, after: Tensor, padding: Padding) -> Tensor:
    if convolves(block.module, before):
        before, after = before.movedim(1, -1), after.movedim(1, -1)
        real = None
    else:
        real = padding.real(_Seen(block.path, block.module), before)
    width = before.shape[-1]
    old, new = before.reshape(-1, width), after.reshape(-1, width)
    if real is not None:
        old, new = old[real.reshape(-1)], new[real.reshape(-1)]
    return F.cosine_similarity(old.double(), new.double(), dim=-1)


def convolves(block: nn.Module, inputs: Tensor) -> bool:
    """Whether channels are the second dimension, because the block begins with a convolution of images."""
    first = next((module for module in block.modules() if layouts(module)), None)
    images = isinstance(first, nn.Conv2d | nn.Conv3d | nn.Conv1d) and inputs.dim() == first.weight.dim()
    return images and inputs.shape[1] == first.in_channels  # type: ignore[union-attr]


def _means(run: _Run) -> dict[str, Tensor]:
    for start, tokens in enumerate(run.tokens):
        if not tokens and start not in run.reshaped:
            raise UsageError(f"{run.each.blocks[start].path}: no calibration token reached this block")
    counts = [float("nan") if start in run.reshaped else tokens for start, tokens in enumerate(run.tokens)]
    weight = torch.tensor(counts, dtype=torch.float64)
    return {name: torch.tensor(total, dtype=torch.float64) / weight for name, total in run.totals.items()}
