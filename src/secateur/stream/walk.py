"""Walk a decoder block by block: only one block's weights and the hidden states between two blocks are held.

The embedding part runs once with every block replaced by a stand-in that hands its input on; what each block is
called with (masks, positions) is caught there. Then each block runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.masks import named_parameters
from secateur.core.statistics import evaluating, forward
from secateur.core.where import Layer
from secateur.errors import InputError, UsageError
from secateur.stream.hidden import Hidden
from secateur.stream.places import Places

__all__ = ["Call", "Decoder", "Running", "bytes_held", "find_decoder", "loaded_blocks", "start"]


@dataclass(frozen=True)
class Decoder:
    """The repeated blocks of a language model.

    Attributes:
        model: the whole model, without values.
        path: path of the `ModuleList` of blocks.
        blocks: its members.
    """

    model: Any
    path: str
    blocks: tuple[nn.Module, ...]

    def layers_of(self, layers: Sequence[Layer], block: int) -> list[Layer]:
        """Those of `layers` that stand in this block."""
        return [layer for layer in layers if layer.name.startswith(f"{self.path}.{block}.")]


@dataclass(frozen=True)
class Call:
    """What one batch calls every block with, beside the hidden states.

    Attributes:
        shape: of the hidden states.
        mask: the batch's own attention mask, `(sequence, token)`, None where all tokens are real.
        given: for each block its further positional and its keyword arguments.
    """

    shape: torch.Size
    mask: Tensor | None
    given: list[tuple[tuple[Any, ...], dict[str, Any]]]


class Running(nn.Module):
    """A block as a model of its own; iterating gives its batches, hidden states read one batch at a time.

    Args:
        block: with its weights.
        number: which of the blocks it is.
        calls: what each batch calls it with.
        hidden: what stands before it.
    """

    def __init__(self, block: nn.Module, number: int, calls: Sequence[Call], hidden: Hidden):
        super().__init__()
        self.block, self.number, self.calls, self.hidden = block, number, calls, hidden
        self.put: Callable[[Tensor], None] | None = None  # hears of every output
        self.given_on = 0  # batches whose outputs it has heard of

    def forward(self, hidden_states: Tensor, call: int, attention_mask: Tensor | None = None) -> Tensor:
        """Run the block as the model would; the mask is for whoever counts tokens, the block has its own."""
        args, kwargs = self.calls[call].given[self.number]
        found = self.block(hidden_states, *args, **kwargs)
        states: Tensor = found if isinstance(found, Tensor) else found[0]
        if states.shape != hidden_states.shape:
            raise UsageError(
                f"block {self.number} turns hidden states of shape {tuple(hidden_states.shape)} into "
                f"{tuple(states.shape)}, so the model cannot be calibrated from file to file. Prune it in memory"
            )
        if self.put is not None:
            self.put(states)
            self.given_on += 1
        return states

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The keyword arguments of each call."""
        for call, known in enumerate(self.calls):
            batch: dict[str, Any] = {"hidden_states": self.hidden.read(call), "call": call}
            yield batch if known.mask is None else {**batch, "attention_mask": known.mask}

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Tell nobody of outputs meanwhile."""
        put, self.put = self.put, None
        try:
            yield
        finally:
            self.put = put

    def give_on(self) -> None:
        """Run every batch through the block with the weights that it has now, unless that was done already."""
        if self.given_on == len(self.calls):
            return
        with evaluating(self):
            for batch in self:
                forward(self, batch)


def find_decoder(model: Any, layers: Sequence[Layer]) -> Decoder:
    """Find the blocks.

    Raises:
        UsageError: not a decoder of repeated blocks, or a layer outside of them is to be pruned.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if getattr(model.config, "is_encoder_decoder", False) or not outer:
        raise UsageError(
            f"{type(model).__name__} is no decoder of repeated blocks, which is what can be calibrated from file to "
            "file. Prune it in memory, or choose a recipe without data"
        )
    path = max(outer, key=lambda one: sum(p.numel() for p in lists[one].parameters()))
    outside = [layer for layer in layers if not layer.name.startswith(f"{path}.")]
    if outside:
        raise UsageError(
            f"{outside[0].name} stands outside of the decoder's blocks ({path}), which alone can be calibrated from "
            f'file to file. Skip it with skip="{outside[0].path}", prune in memory, or choose a recipe without data'
        )
    return Decoder(model, path, tuple(lists[path]))


def start(
    decoder: Decoder, places: Places, batches: Sequence[Any], put: Callable[[Tensor], None]
) -> list[Call]:
    """Run the embedding part: the calls of every block for each batch; `put` gets the first block's hidden states.

    Raises:
        UsageError: the model does something between its blocks, or does not call them one after the other.
    """
    decoder.model.config.use_cache = False
    calls = []
    with _outside_loaded(decoder, places):
        for batch in batches:
            states, given = _caught(decoder, batch)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            put(states)
            calls.append(Call(states.shape, mask, given))
    return calls


def bytes_held(calls: Sequence[Call]) -> int:
    """What the calls keep in memory: masks and positions, which blocks mostly share."""
    found: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for inner in value.values():
                add(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                add(inner)

    for call in calls:
        add(call.given)
    return sum(found.values())


class _CaughtError(Exception):
    """Ends the embedding part at the output head; until there a block could be called once more."""


def _caught(decoder: Decoder, batch: Any) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """One batch; blocks of some models return their hidden states, of others a tuple that begins with them."""
    for in_tuple in (False, True):
        problem: Exception | None = None
        seen: list[tuple[int, Tensor]] = []
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with _replaced(decoder, seen, given, in_tuple), evaluating(decoder.model):
            try:
                forward(decoder.model, batch)
            except _CaughtError:
                pass
            except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
                problem = error  # behind the last block, where some weights are missing, it means nothing
        orderly = [number for number, _ in seen] == list(range(len(decoder.blocks)))
        if orderly and all(states is seen[0][1] for _, states in seen):
            return seen[0][1], given
        if not seen:
            raise UsageError(f"the calibration data do not fit {type(decoder.model).__name__}: {problem}")
    raise UsageError(
        f"{type(decoder.model).__name__} does not simply hand hidden states from block to block, so it cannot be "
        "calibrated from file to file. Prune it in memory, or choose a recipe without data"
    )


@contextmanager
def _replaced(decoder: Decoder, seen: list, given: list, in_tuple: bool) -> Iterator[None]:
    """Every block hands its input on; the output head, where there is one, ends the forward pass."""

    def stand_in(number: int) -> Any:
        def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((number, hidden_states))
            given.append((args, kwargs))
            return (hidden_states,) if in_tuple else hidden_states

        return passed

    def end(*_: Any) -> None:
        raise _CaughtError

    head = decoder.model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(end)
    for number, block in enumerate(decoder.blocks):
        block.forward = stand_in(number)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for block in decoder.blocks:
            del block.forward


@contextmanager
def _outside_loaded(decoder: Decoder, places: Places) -> Iterator[None]:
    """Give values to everything outside of the blocks, but the output head, which is never reached."""
    head = decoder.model.get_output_embeddings()
    own = set() if head is None else {f"{p}." for p, m in decoder.model.named_modules() if m is head}
    kept: dict[int, nn.Parameter] = {}
    empty: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for name, parameter in named_parameters(decoder.model).items():
        if name.startswith((f"{decoder.path}.", *own)):
            continue
        path, _, last = name.rpartition(".")
        owner = decoder.model.get_submodule(path)
        empty.append((owner, last, owner._parameters[last]))
        if id(parameter) not in kept:
            kept[id(parameter)] = _parameter(places.read(name))
        owner._parameters[last] = kept[id(parameter)]
    _fill_buffers(decoder.model, "", places)
    try:
        yield
    finally:
        for owner, last, before in empty:
            owner._parameters[last] = before


def loaded_blocks(decoder: Decoder, places: Places, first: int, last: int) -> Generator[tuple[int, nn.Module]]:
    """Each block from `first` to `last` with its weights in float32; the next one is read meanwhile."""
    with ThreadPoolExecutor(1, "reader") as reader:
        coming = reader.submit(_read_block, decoder, places, first)
        for number in range(first, last + 1):
            tensors = coming.result()
            if number < last:
                coming = reader.submit(_read_block, decoder, places, number + 1)
            block = decoder.blocks[number]
            before = {}
            for name in list(tensors):
                path, _, own = name.rpartition(".")
                owner = block.get_submodule(path)
                before[name] = (owner, own, owner._parameters[own])
                owner._parameters[own] = _parameter(tensors.pop(name))
            _fill_buffers(block, f"{decoder.path}.{number}.", places)
            try:
                yield number, block
            finally:
                for owner, own, empty in before.values():
                    owner._parameters[own] = empty


def _read_block(decoder: Decoder, places: Places, number: int) -> dict[str, Tensor]:
    """The weights of a block as they are stored."""
    names = named_parameters(decoder.blocks[number])
    return {name: places.read(f"{decoder.path}.{number}.{name}") for name in names}


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)


def _fill_buffers(module: nn.Module, prefix: str, places: Places) -> None:
    """Buffers that the files hold; all others have the values that the model gave them."""
    for name, buffer in module.named_buffers():
        pieces = places.pieces.get(prefix + name)
        if not pieces or len(pieces) > 1:
            continue
        stored = places.shards.read(pieces[0].name)
        if stored.shape != buffer.shape:
            raise InputError(
                f"{prefix}{name} is stored with shape {tuple(stored.shape)} instead of {tuple(buffer.shape)}"
            )
        buffer.copy_(stored)
