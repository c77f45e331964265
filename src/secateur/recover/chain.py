"""The data's way through a chain of blocks: what enters a block is kept, so no block is reached from the model's start.

The embedding part runs once with every block replaced by a stand-in that hands its input on; what each block is called
with (masks, positions) is caught there. Whether a model is such a chain is not judged by its kind: one piece of
data is walked through the blocks and run through the model, and all that enters and leaves every block must be the same
bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.depth import series
from secateur.core.stacks import below
from secateur.core.statistics import forward
from secateur.errors import UsageError
from secateur.recover.fitting import tensor_of

__all__ = ["Reached", "Walk", "chained", "is_chain", "links"]

# what a block is called with: positional and keyword arguments
Call = tuple[tuple[Any, ...], dict[str, Any]]
# what a model does when its blocks are not what they seem; or memory that is not there for what is kept
NO_CHAIN = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, UsageError)
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass that has done its work
    """Ends a forward pass that has done its work."""


class Walk:
    """Pieces of data on their way through the blocks of one model.

    Args:
        model: in evaluation mode, without gradients.
        paths: of its blocks, in order.
        pieces: of data.
        forms: what each block returns beside its hidden states: None for a tensor alone, else what follows
            them in a tuple.

    Cost: memory for the hidden states of all pieces, and for the masks and positions that blocks are called with.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], pieces: Sequence[Any], forms: Sequence[Any]
    ) -> None:
        self.paths = paths
        self.blocks = [model.get_submodule(path) for path in paths]
        self.number = 0  # of the block before which the pieces stand
        self.hidden: list[Tensor] = []
        self.calls: list[deque[Call]] = []  # of this block and those behind it
        for piece in pieces:
            states, calls = _handed_on(model, self.blocks, piece, forms)
            self.hidden.append(states)
            self.calls.append(calls)

    def __call__(self, piece: int) -> Any:
        """Run a piece through the block before which it stands."""
        args, kwargs = self.calls[piece][0]
        return self.blocks[self.number](self.hidden[piece], *args, **kwargs)

    def given(self, piece: int) -> Call:
        """What that block is called with."""
        args, kwargs = self.calls[piece][0]
        return (self.hidden[piece], *args), kwargs

    def to(self, path: str) -> None:
        """Walk on until all pieces stand before the block that holds this module, with the weights of now."""
        while below(self.paths[self.number], path) is None:
            for piece in range(len(self.hidden)):
                self.hidden[piece] = tensor_of(self(piece), self.paths[self.number])
                self.calls[piece].popleft()
            self.number += 1


def chained(
    model: nn.Module, dense: nn.Module, paths: Sequence[str], pieces: Sequence[Any]
) -> tuple[Walk, Walk] | None:
    """A walk through either model, to be stopped in the blocks that hold these modules.

    None where they are no simple chain, such as encoder and decoder, blocks that share keys and values, a model that
    does something between its blocks, or a block that writes into its input.

    Args:
        model: in evaluation mode, without gradients or a cache of keys and values; so is `dense`.
        dense: of the same structure.
        paths: of modules in the blocks, in the order in which they are used.
        pieces: of data; the first one is run through both models to see.

    Cost: two forward passes of the first piece through each model, and the embedding part for all; memory as `Walk`
        says, for two models.
    """
    blocks = links(model, paths)
    if blocks is None:
        return None
    try:
        forms = [_forms(each, blocks, pieces[0]) for each in (model, dense)]
        if forms[0] is None or forms[1] is None:
            return None
        return Walk(model, blocks, pieces, forms[0]), Walk(dense, blocks, pieces, forms[1])
    except NO_CHAIN:
        return None


def is_chain(model: nn.Module, paths: Sequence[str], piece: Any) -> bool:
    """Whether `chained` would walk to these modules, judged by this piece of data.

    Cost: two forward passes of the piece.
    """
    blocks = links(model, paths)
    try:
        return blocks is not None and _forms(model, blocks, piece) is not None
    except NO_CHAIN:
        return False


def links(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...] | None:
    """Paths of the model's blocks; None where they stand in several lists or hold the modules in another order."""
    lists = series(model)
    blocks = tuple(block.path for block in lists[0].blocks)
    places = [next((n for n, block in enumerate(blocks) if below(block, p) is not None), -1) for p in paths]
    return blocks if len(lists) == 1 and places == sorted(places) and -1 not in places else None


def _forms(model: nn.Module, paths: Sequence[str], piece: Any) -> list[Any] | None:
    """What the blocks return beside hidden states; None where walking is not what the model does with this piece."""
    blocks = [model.get_submodule(path) for path in paths]
    seen = _run(model, blocks, piece)
    forms = [tuple(output[1:]) if isinstance(output, tuple) else None for _, _, output in seen]
    if [number for number, _, _ in seen] != list(range(len(blocks))):
        return None
    if any(value is not None for form in forms for value in form or ()):
        return None
    walk = Walk(model, paths, [piece], forms)
    for number, call, output in seen:
        found = walk(0)
        # what it was called with is looked at afterwards: a block must not write into it
        if not _same(found, output) or not _same(walk.given(0), call):
            return None
        if number < len(paths) - 1:
            walk.to(paths[number + 1])
    return forms


def _run(model: nn.Module, blocks: Sequence[nn.Module], piece: Any) -> list[tuple[int, Call, Any]]:
    """The calls of the blocks in the model, copied before they change, and what they return."""
    seen: list[tuple[int, Call, Any]] = []

    def watched(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = _copy((args, kwargs))
            output = own(*args, **kwargs)
            seen.append((number, before, _copy(output)))
            return output

        return run

    with _replaced(blocks, watched):
        forward(model, piece)
    return seen


def _handed_on(
    model: nn.Module, blocks: Sequence[nn.Module], piece: Any, forms: Sequence[Any]
) -> tuple[Tensor, deque[Call]]:
    """What enters the first block, and what each is called with beside hidden states."""
    states: list[Tensor] = []
    calls: deque[Call] = deque()

    def stand_in(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if number != len(calls) or not args or not isinstance(args[0], Tensor):
                raise UsageError("blocks are not called one after the other with hidden states")
            states.append(args[0])
            calls.append((args[1:], kwargs))
            if len(calls) == len(blocks):
                raise Reached
            form = forms[number]
            return args[0] if form is None else (args[0], *form)

        return run

    with _replaced(blocks, stand_in):
        try:
            forward(model, piece)
        except Reached:
            return states[0], calls
    raise UsageError("not every block is called")


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module], by: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Another `forward` for each block, not a hook: modules may choose other kernels where they have hooks."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.forward = by(number, block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own


def _copy(value: Any) -> Any:
    """The value with its tensors as they are now."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return tuple(_copy(each) for each in value)
    return {key: _copy(each) for key, each in value.items()} if isinstance(value, dict) else value


def _same(found: Any, expected: Any) -> bool:
    """The same bits and plain values; nothing else (a cache, a function) is comparable, so it is never the same."""
    if isinstance(found, Tensor):
        return isinstance(expected, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(found, tuple | list):
        return (
            isinstance(expected, tuple)
            and len(found) == len(expected)
            and all(_same(a, b) for a, b in zip(found, expected, strict=True))
        )
    if isinstance(found, dict):
        return (
            isinstance(expected, dict)
            and found.keys() == expected.keys()
            and all(_same(each, expected[key]) for key, each in found.items())
        )
    return isinstance(found, PLAIN) and type(found) is type(expected) and found == expected
