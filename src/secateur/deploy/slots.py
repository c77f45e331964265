"""Integers that a model's modules remember: attributes, tuples of them, configurations; found, read, written."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ATTRIBUTE", "Slot", "change", "integers", "numbers_of", "read", "ways", "write_"]

Step = str | int

ATTRIBUTE = "secateur"  # where `shrink` leaves its note
TORCH = {name for name in vars(nn.Module()) if name.startswith("_")} | {"training", ATTRIBUTE}
DEPTH, LENGTH = 4, 64  # how deep containers are opened, and how long a list of sizes may be
OPAQUE = (
    nn.Module,
    Tensor,
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    torch.dtype,
    str,
    bytes,
)


@dataclass(frozen=True)
class Slot:
    """One integer: the module that holds it and the way to it, such as ("config", "hidden_size")."""

    module: str
    path: tuple[Step, ...]

    def __str__(self) -> str:
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)
        return f"{self.module}{steps}" if self.module else steps.lstrip(".")

    @property
    def name(self) -> str:
        """The last word of the way."""
        return next((str(step) for step in reversed(self.path) if isinstance(step, str)), "")


def integers(module: nn.Module, path: str) -> Iterator[tuple[Slot, int]]:
    """Every integer above 1 that a module itself remembers, not those of its submodules."""
    for name, value in vars(module).items():
        if name not in TORCH:
            for way, number in _inside(value, DEPTH, set()):
                yield Slot(path, (name, *way)), number


def numbers_of(model: nn.Module) -> dict[Slot, int]:
    """Every such integer of a model and its submodules."""
    return {slot: n for path, module in model.named_modules() for slot, n in integers(module, path)}


def _inside(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[tuple[Step, ...], int]]:
    if type(value) is int:
        if value > 1:
            yield (), value
        return
    if depth == 0 or id(value) in seen:
        return
    for step, inner in _children(value):
        for way, number in _inside(inner, depth - 1, seen | {id(value)}):
            yield (step, *way), number


def _children(value: Any) -> list[tuple[Step, Any]]:
    if isinstance(value, (tuple, list)):
        return list(enumerate(value)) if len(value) <= LENGTH else []
    if isinstance(value, dict):
        return [(k, v) for k, v in value.items() if isinstance(k, str)] if len(value) <= LENGTH * 4 else []
    if isinstance(value, OPAQUE) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).items())


def _get(value: Any, step: Step) -> Any:
    if isinstance(value, (tuple, list)) and isinstance(step, int):
        return value[step]
    return value[step] if isinstance(value, dict) else vars(value)[step]


def _put(value: Any, way: tuple[Step, ...], number: Any) -> Any:
    """Set what lies at the end of the way; the container, a new one where it cannot be changed."""
    if not way:
        return number
    step, *rest = way
    inner = _put(_get(value, step), tuple(rest), number)
    if isinstance(value, (tuple, list)):
        items = [*value]
        items[step] = inner  # type: ignore[index]
        if type(value) is list:
            value[:] = items
            return value
        return torch.Size(items) if type(value) is torch.Size else _tuple(value, items)
    if isinstance(value, dict):
        value[step] = inner
    else:
        vars(value)[step] = inner
    return value


def _tuple(like: Any, items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else tuple(items)


def ways(config: Any) -> Iterator[tuple[tuple[Step, ...], int | None]]:
    """Every integer above 1 that a configuration holds, and every field that is None, with the way to it."""
    yield from _inside(config, DEPTH, set())
    for name, value in vars(config).items():
        if value is None and not name.startswith("_"):
            yield (name,), None


def change(container: Any, way: tuple[Step, ...], number: Any) -> None:
    """Set the number at the end of a way."""
    _put(container, way, number)


def read(model: nn.Module, slot: Slot) -> Any:
    """The number in a slot.

    Raises:
        KeyError, IndexError, AttributeError: there is no such slot.
    """
    value: Any = model.get_submodule(slot.module)
    for step in slot.path:
        value = _get(value, step)
    return value


def write_(model: nn.Module, numbers: Mapping[Slot, Any]) -> None:
    """Put numbers into slots; a configuration that modules share is copied where they need different ones.

    A number on which all modules that share a container agree goes into the shared one. On what they disagree
    the shared one stays as it is, and each module gets a copy with its own numbers.

    Args:
        model: Changed in place.
        numbers: Slot -> its new number.
    """
    wanted: dict[tuple[str, str], Changes] = {}  # module and attribute -> changes of what it holds
    for slot, number in numbers.items():
        wanted.setdefault((slot.module, str(slot.path[0])), {})[slot.path[1:]] = number
    shared: dict[int, list[tuple[nn.Module, str, Changes]]] = {}
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name in TORCH:
                continue
            changes = wanted.get((path, name), {})
            if isinstance(value, (int, tuple)):
                vars(module)[name] = _changed(value, changes)
            elif _children(value):
                shared.setdefault(id(value), []).append((module, name, changes))
    for holders in shared.values():
        _write_shared(holders)


Changes = dict[tuple[Step, ...], Any]


def _write_shared(holders: list[tuple[nn.Module, str, Changes]]) -> None:
    opinions: dict[tuple[Step, ...], list[Any]] = {}
    for _, _, changes in holders:
        for way, number in changes.items():
            if number not in opinions.setdefault(way, []):
                opinions[way].append(number)
    module, name, _ = holders[0]
    base = _changed(vars(module)[name], {way: found[0] for way, found in opinions.items() if len(found) == 1})
    copies: list[tuple[Changes, Any]] = []
    for module, name, changes in holders:
        own = {way: number for way, number in changes.items() if len(opinions[way]) > 1}
        known = next((value for other, value in copies if other == own), None)
        if own and known is None:
            known = _changed(copy.deepcopy(base), own)
            copies.append((own, known))
        if own:
            vars(module)[name] = known


def _changed(value: Any, changes: Changes) -> Any:
    for way, number in changes.items():
        value = _put(value, way, number)
    return value
