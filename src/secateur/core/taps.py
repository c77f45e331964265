"""Taps: a module reads some positions of what it is handed, and everybody else keeps all of them.

What several modules share (a table of rotary angles, a relative bias, the residual stream) ties their units
together, because each reads the same positions of it. A module with a tap reads through an index of its own: at first
all positions, so that nothing changes; when units go, the index loses theirs, and what is shared stays whole. A tap
on the residual stream writes back as well: the module's result goes to the positions that were read, the others
stay as they came.

The index is a buffer of a small module called `decoupled`; two hooks, the same functions everywhere, do the rest. So
a tapped model can be copied, exported, trained and saved like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError

__all__ = ["NAME", "Decoupled", "Tap", "parameter_names", "selections", "tap_", "taps_of", "untap_"]

NAME = "decoupled"  # what the module with the indices is called

Step = str | int


@dataclass(frozen=True, slots=True)
class Tap:
    """One tensor that a module is handed, and the dimension of it that is read through an index.

    Attributes:
        name: of the index, "rope", "bias" or "residual", with a number where there are several.
        leaf: the way to the tensor: a parameter of the module's forward, then positions and keys.
        dim: the dimension.
        size: positions that it has.
        writes: whether the module's result, a tensor of the same shape, goes back to the positions that were read.
    """

    name: str
    leaf: tuple[Step, ...]
    dim: int
    size: int
    writes: bool = False

    def __str__(self) -> str:
        return "".join(f"[{step!r}]" if at else str(step) for at, step in enumerate(self.leaf))


class Decoupled(nn.Module):
    """The indices of one module's taps, buffers of a state_dict like any other.

    Args:
        taps: several may share an index by its name.
        names: positional parameters of the module's forward, in order.
    """

    def __init__(self, taps: Sequence[Tap], names: Sequence[str]) -> None:
        super().__init__()
        self.taps, self.names = tuple(taps), tuple(names)
        self.handed: list[Any] = []  # what the running call was handed, until it has returned
        for tap in taps:
            if tap.name not in self._buffers:
                self.register_buffer(tap.name, torch.arange(tap.size))

    def extra_repr(self) -> str:
        """The taps in words."""
        return ", ".join(f"{tap.name}: {tap}, dim {tap.dim}" for tap in self.taps)


def tap_(module: nn.Module, taps: Sequence[Tap]) -> None:
    """Give a module taps.

    Raises:
        UsageError: it has some already, or runs whatever it holds.
    """
    if hasattr(module, NAME):
        raise UsageError(
            f"{type(module).__name__} has a part called {NAME} already; it cannot be decoupled twice"
        )
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise UsageError(f"{type(module).__name__} runs what it holds, so it has no place for a tap")
    own = Decoupled(taps, parameter_names(module))
    like = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
    module.add_module(NAME, own if like is None else own.to(like.device))
    module.register_forward_pre_hook(_before, with_kwargs=True)
    module.register_forward_hook(_after, with_kwargs=True)


def untap_(module: nn.Module) -> None:
    """Take a module's taps away again."""
    delattr(module, NAME)
    for table in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in table.items() if hook in (_before, _after)]:
            del table[key]
    for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
        for key in [key for key in flags if key not in {*module._forward_pre_hooks, *module._forward_hooks}]:
            del flags[key]


def taps_of(model: nn.Module) -> dict[str, tuple[Tap, ...]]:
    """Module path -> its taps."""
    return {
        path.removesuffix(NAME).removesuffix("."): module.taps
        for path, module in model.named_modules()
        if isinstance(module, Decoupled)
    }


def selections(model: nn.Module) -> set[str]:
    """Names of the buffers that are indices of taps: what is read through them may lose positions."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, Decoupled)
        for name in module._buffers
    }


def parameter_names(module: nn.Module) -> list[str]:
    """Positional parameters of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds]


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand the module what it reads."""
    own: Decoupled = module.decoupled
    own.handed.clear()
    given, named = list(args), dict(kwargs)
    for tap in own.taps:
        first, *rest = tap.leaf
        place: Any = named if first in named else given
        key: Any = first if first in named else own.names.index(str(first)) if first in own.names else None
        if key is None or (place is given and key >= len(given)) or place[key] is None:
            continue  # not handed in this call
        whole = _get(place[key], rest)
        if whole is None:
            continue
        read = whole.index_select(tap.dim, own._buffers[tap.name])
        place[key] = _put(place[key], rest, read)
        own.handed.append((tap, whole, read))
    return tuple(given), named


def _after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Give back what was handed in, or the whole stream with the module's result in its place."""
    own: Decoupled = module.decoupled
    for tap, whole, read in reversed(own.handed):
        output = _written(whole, tap, own, output) if tap.writes else _replaced(output, read, whole)
    own.handed.clear()
    return output


def _written(whole: Tensor, tap: Tap, own: Decoupled, output: Any) -> Any:
    index: Any = own._buffers[tap.name]
    if isinstance(output, Tensor):
        return whole.index_copy(tap.dim, index, output)
    return type(output)([whole.index_copy(tap.dim, index, output[0]), *output[1:]])


def _replaced(value: Any, read: Tensor, whole: Tensor) -> Any:
    """Modules may hand on what they were handed: the next one has taps of its own."""
    if value is read:
        return whole
    if type(value) in (tuple, list):
        return type(value)(_replaced(inner, read, whole) for inner in value)
    return value


def _get(value: Any, way: Sequence[Step]) -> Any:
    for step in way:
        value = value[step]
    return value


def _put(value: Any, way: Sequence[Step], new: Any) -> Any:
    if not way:
        return new
    step, *rest = way
    inner = _put(value[step], rest, new)
    if isinstance(value, Mapping):
        return {**value, step: inner}
    return type(value)(inner if at == step else old for at, old in enumerate(value))
