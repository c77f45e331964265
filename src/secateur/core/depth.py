"""The depth of a model: its lists of repeated blocks, and taking blocks out of them.

Where the outermost repeated blocks are stages that differ from each other (Swin, ConvNeXt), the blocks inside
them are what a list holds. Numbers run over all lists of a stack, as in `secateur.core.stacks`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.core.matrix import layouts
from secateur.core.stacks import Block, Stack, join, stacks
from secateur.errors import UsageError, nearest

__all__ = ["Edits", "Series", "Which", "chosen", "series", "take_out_", "without"]

Which = int | str | Iterable[int | str]  # running numbers of blocks, or their paths


@dataclass(frozen=True)
class Series:
    """One `ModuleList` or `Sequential` that holds repeated blocks.

    Attributes:
        path: where it is.
        module: the list itself.
        blocks: its blocks, in order.
    """

    path: str
    module: nn.Module
    blocks: tuple[Block, ...]

    @property
    def stack(self) -> Stack:
        """The stack that it belongs to."""
        return self.blocks[0].stack


def series(model: nn.Module) -> tuple[Series, ...]:
    """Every list of repeated blocks, in registration order.

    Raises:
        UsageError: the model has none.

    Example:
        >>> layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> [(each.path, len(each.blocks)) for each in series(nn.Sequential(nn.ModuleList([layer(), layer()])))]
        [('0', 2)]
    """
    owners = {module for module in model.modules() if layouts(module)}
    blocks = list(stacks(model, owners)[0].values())
    lists = _lists(blocks)
    if any(len(each) > 1 for each in lists.values()) and _are_stages(blocks):
        inner = [below for block in blocks for below in _inside(block, owners)]
        if inner:
            lists = _lists(_renumbered(inner))
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no repeated blocks (a ModuleList or Sequential of like modules), so no "
            "depth to take away; prune its weights or units instead"
        )
    return tuple(Series(path, model.get_submodule(path), tuple(found)) for path, found in lists.items())


def _lists(blocks: Iterable[Block]) -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in blocks:
        found.setdefault(block.path.rpartition(".")[0], []).append(block)
    return found


def _are_stages(blocks: Sequence[Block]) -> bool:
    """No two of them have the same tensors."""
    shapes = [
        frozenset((name, tuple(p.shape)) for name, p in block.module.named_parameters()) for block in blocks
    ]
    return len(set(shapes)) == len(shapes)


def _inside(stage: Block, owners: Collection[nn.Module]) -> list[Block]:
    found = stacks(stage.module, owners)[0]
    return [Block(join(stage.path, path), block.module, stage.stack, 0) for path, block in found.items()]


def _renumbered(blocks: Iterable[Block]) -> list[Block]:
    counts: Counter[Stack] = Counter()
    found = []
    for block in blocks:
        found.append(block._replace(number=counts[block.stack]))
        counts[block.stack] += 1
    return found


def chosen(model: nn.Module, which: Which, stack: Stack | None = None) -> tuple[Block, ...]:
    """The blocks that `which` names, in order and once each.

    Args:
        model: any model with repeated blocks.
        which: running numbers (negative ones count from the end) or paths.
        stack: "encoder" or "decoder", for numbers in a model that has both.

    Raises:
        UsageError: an unknown block; numbers that could mean either stack.
    """
    every = [block for each in series(model) for block in each.blocks]
    paths = {block.path: block for block in every}
    names = [which] if isinstance(which, int | str) else list(which)
    if len({block.stack for block in every}) > 1 and stack is None and any(isinstance(n, int) for n in names):
        raise UsageError(
            "the model has blocks in an encoder and in a decoder; say which with stack='encoder' or 'decoder', or "
            "give paths"
        )
    numbers = {block.number: block for block in every if stack is None or block.stack == stack}
    found = {}
    for name in names:
        if isinstance(name, str):
            if name not in paths:
                raise UsageError(f"block {name!r} is none of the {len(paths)} blocks; {nearest(name, paths)}")
            block = paths[name]
        else:
            number = name + len(numbers) if name < 0 else name
            if number not in numbers:
                raise UsageError(f"block {name} is not there; the blocks are 0 to {len(numbers) - 1}")
            block = numbers[number]
        found[block.path] = block
    return tuple(block for path, block in paths.items() if path in found)


class Edits:
    """Changes of attributes and lists that can be undone, last first."""

    def __init__(self) -> None:
        self._back: list[Callable[[], Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._back.append(lambda: setattr(owner, name, before))

    def children(self, owner: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
        """Set the children of a module."""
        before = dict(owner._modules)
        self._put(owner, children)
        self._back.append(lambda: self._put(owner, before))

    @staticmethod
    def _put(owner: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
        owner._modules.clear()
        owner._modules.update(children)

    def undo(self) -> None:
        """Put everything back."""
        while self._back:
            self._back.pop()()


@contextmanager
def without(model: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """The model without some blocks, for the time being."""
    edits = take_out_(model, blocks)
    try:
        yield model
    finally:
        edits.undo()


def take_out_(model: nn.Module, blocks: Sequence[Block]) -> Edits:
    """Take blocks out of their lists; numbers inside of blocks, sizes beside the lists and the config follow.

    Args:
        model: changed in place.
        blocks: some of the model's own, from `chosen` or `series`.

    Returns:
        How to undo it.

    Raises:
        UsageError: a list would lose its last block.
    """
    gone = {block.path for block in blocks}
    edits = Edits()
    for each in series(model):
        kept = [position for position, block in enumerate(each.blocks) if block.path not in gone]
        if len(kept) == len(each.blocks):
            continue
        if not kept:
            raise UsageError(f"{each.path}: all {len(each.blocks)} blocks would go; keep at least one of them")
        _renumber(each, kept, edits)
        _follow(model, each, kept, edits)
        _shorten(each, gone, edits)
    return edits


def _shorten(each: Series, gone: Collection[str], edits: Edits) -> None:
    left = [(name, child) for name, child in each.module._modules.items() if join(each.path, name) not in gone]
    if all(name.isdigit() for name in each.module._modules):
        left = [(str(number), child) for number, (_, child) in enumerate(left)]
    edits.children(each.module, dict(left))


# an attribute that holds a block's own number, and says so
NUMBER = re.compile(r"(layer|block)_?(idx|index|id|number|num|no)")
MAYBE_NUMBER = re.compile(r"idx|index|layer|block|depth|number|(^|_)id$")


def _renumber(each: Series, kept: Sequence[int], edits: Edits) -> None:
    """Attributes that hold the number of their block, as `layer_idx`, get the new one."""
    held: dict[tuple[str, str], dict[int, nn.Module]] = {}
    for position, block in enumerate(each.blocks):
        for path, module in block.module.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and MAYBE_NUMBER.search(name):
                    held.setdefault((path, name), {})[position] = module
    for (_, name), owners in held.items():
        offsets = {getattr(module, name) - position for position, module in owners.items()}
        if len(offsets) == 1 and (len(owners) > 1 or NUMBER.fullmatch(name)):
            offset = offsets.pop()
            for new, old in enumerate(kept):
                if old in owners:
                    edits.set(owners[old], name, new + offset)


# the names under which configs and modules count their blocks
COUNT = re.compile(r"num_hidden_layers|num_(en|de)coder_layers|(en|de)coder_layers|num_layers|n_layers?|depth")
# lists with one entry a block
ENTRIES = re.compile(r"layer|block|pattern|intermediate_size|depth")
# lists of block numbers
NUMBERS = re.compile(r"(layers|idx|idxs|indices|indexes|layer_ids)$")
# the first so many blocks are of another kind
PREFIXES = ("first_k_dense_replace", "max_window_layers")


def _follow(model: nn.Module, each: Series, kept: Sequence[int], edits: Edits) -> None:
    """Counts beside the list and in configs get the new number of blocks."""
    before = len(each.blocks)
    parent = model.get_submodule(each.path.rpartition(".")[0])
    for name, value in list(vars(parent).items()):
        if type(value) is int and value == before and COUNT.fullmatch(name):
            edits.set(parent, name, len(kept))
    top = getattr(model, "config", None)
    private = _own_config(model, each.path)
    for config in _configs(top, private):
        shared = config is top and getattr(top, "is_encoder_decoder", False)
        _follow_config(config, each, kept, edits, model, shared=bool(shared))


def _own_config(model: nn.Module, path: str) -> Any:
    """The config of the innermost module around a list that has one."""
    found = getattr(model, "config", None)
    parts = path.split(".")
    for depth in range(1, len(parts)):
        found = getattr(model.get_submodule(".".join(parts[:depth])), "config", found)
    return found


def _configs(top: Any, private: Any) -> list[Any]:
    """The configs that speak of the list: its module's own, and those of the same kind from the model's down."""
    if private is None:
        return []
    found = [private]
    waiting = [top]
    while waiting:
        config = waiting.pop(0)
        if type(config) is type(private) and not any(config is other for other in found):
            found.append(config)
        waiting += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return found


def _follow_config(
    config: Any, each: Series, kept: Sequence[int], edits: Edits, model: nn.Module, *, shared: bool
) -> None:
    before, after = len(each.blocks), len(kept)
    for name, value in list(vars(config).items()):
        if name.startswith("_") or (shared and not _speaks_of(name, each.stack)):
            continue
        if name == "depths" and isinstance(value, list | tuple):
            stage = [other.path for other in series(model) if other.stack == each.stack].index(each.path)
            if stage < len(value) and value[stage] == before:
                edits.set(config, name, type(value)([*value[:stage], after, *value[stage + 1 :]]))
        elif type(value) is int and value == before and COUNT.fullmatch(name):
            edits.set(config, name, after)
        elif type(value) is int and name in PREFIXES:
            edits.set(config, name, sum(old < value for old in kept) if value < before else value)
        elif isinstance(value, list | tuple):
            new = _entries(name, value, before, kept)
            if new is not None:
                edits.set(config, name, type(value)(new))


def _entries(name: str, value: Sequence[Any], before: int, kept: Sequence[int]) -> list[Any] | None:
    """A list of a config that speaks of single blocks, for the kept ones; None for any other."""
    ascending = all(type(v) is int for v in value) and sorted(set(value)) == list(value)
    if NUMBERS.search(name) and value and ascending and value[0] >= 0 and value[-1] < before:
        return [new for new, old in enumerate(kept) if old in value]
    if len(value) == before and ENTRIES.search(name):
        return [value[old] for old in kept]
    return None


def _speaks_of(name: str, stack: Stack) -> bool:
    """Whether a name in the one config of an encoder-decoder belongs to a stack; names without a word are the
    encoder's."""
    return ("decoder" in name) == (stack == "decoder")
