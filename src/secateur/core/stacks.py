"""The repeated blocks of a model, and the stack each of them stands in.

Repeated blocks are the outermost elements of a `ModuleList` or `Sequential` that share a class and hold more
than one bare matrix: transformer layers, CNN stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

from torch import nn

__all__ = ["Block", "Stack", "below", "called", "join", "kind", "prefixes", "stacks"]

Stack = Literal["encoder", "decoder"]


class Block(NamedTuple):
    """A repeated block: where it is, its stack, and its running number there."""

    path: str
    module: nn.Module
    stack: Stack
    number: int


def stacks(model: nn.Module, owners: Collection[nn.Module]) -> tuple[dict[str, Block], bool]:
    """The repeated blocks by path, in registration order, and whether they form an encoder and a decoder.

    Args:
        model: any model; where its blocks form a single stack, that one is called "encoder".
        owners: the modules that own matrices themselves; a list of these alone is no list of blocks.
    """
    blocks = _blocks(model, owners)
    encoder = _encoder(model, blocks)
    counts: Counter[Stack] = Counter()
    numbered: dict[str, Block] = {}
    for path, module in blocks.items():
        stack: Stack = "encoder" if encoder is None or below(encoder, path) is not None else "decoder"
        numbered[path] = Block(path, module, stack, counts[stack])
        counts[stack] += 1
    return numbered, encoder is not None


def _blocks(model: nn.Module, owners: Collection[nn.Module]) -> dict[str, nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    everywhere = Counter(kind(child) for each in lists for child in each if _compound(child, owners))
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(prefix in found for prefix in prefixes(path)):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential):
            repeated = _repeated(module, owners, everywhere)
            for name, child in module.named_children():
                if kind(child) in repeated and _compound(child, owners):
                    found[join(path, name)] = child
    return found


def _repeated(module: nn.ModuleList | nn.Sequential, owners: Collection[nn.Module], everywhere: Counter) -> set:
    """The kinds of elements that make `module` a list of blocks."""
    kinds = Counter(kind(child) for child in module if _compound(child, owners))
    if isinstance(module, nn.ModuleList):
        # one layer is a list of blocks too; and layers of several kinds may alternate
        return set(kinds) if len(kinds) == 1 or max(kinds.values(), default=0) > 1 else set()
    return {each for each in kinds if everywhere[each] > 1}


def _compound(module: nn.Module, owners: Collection[nn.Module]) -> bool:
    """Holds matrices, and is not itself a bare one."""
    inside = [child for child in module.modules() if child in owners]
    return bool(inside) and inside != [module]


def kind(module: nn.Module) -> object:
    """The class; of a plain container also the classes of what it contains."""
    if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        return (type(module), *(kind(child) for child in module.children()))
    return type(module)


def _encoder(model: nn.Module, blocks: dict[str, nn.Module]) -> str | None:
    """The path of the encoder of an encoder-decoder model; None where there is one stack only."""
    claimed = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    if claimed is False:
        return None
    encoder: Any = called(model, "get_encoder") if claimed else None
    for path, module in model.named_modules():
        if module is encoder and len({below(path, block) is None for block in blocks}) == 2:
            return path
    for path, module in model.named_modules():
        sides = {side: getattr(module, side, None) for side in ("encoder", "decoder")}
        if all(isinstance(side, nn.Module) for side in sides.values()):
            paths = [join(path, side) for side in sides]
            if all(any(below(side, block) is not None for block in blocks) for side in paths):
                return paths[0]
    return None


def called(model: nn.Module, method: str) -> Any:
    """What a method of Hugging Face models returns, None where the model has no such thing."""
    function = getattr(model, method, None)
    try:
        return function() if callable(function) else None
    except (NotImplementedError, AttributeError):
        return None


def join(path: str, name: str) -> str:
    """The path of what is called `name` inside `path`; the model itself has the empty path."""
    return f"{path}.{name}" if path else name


def prefixes(path: str) -> Iterator[str]:
    """The paths of all modules around `path`, the model first, and the path itself.

    Example:
        >>> list(prefixes("h.0.attn"))
        ['', 'h', 'h.0', 'h.0.attn']
    """
    yield ""
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        yield ".".join(parts[: depth + 1])


def below(outer: str, path: str) -> str | None:
    """`path` as seen from `outer`; None when it is not inside.

    Example:
        >>> below("h.1", "h.1.attn"), below("h.1", "h.10.attn"), below("", "h")
        ('attn', None, 'h')
    """
    if not outer or outer == path:
        return "" if outer == path else path
    return path[len(outer) + 1 :] if path.startswith(outer + ".") else None
