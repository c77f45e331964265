"""The cuts of a shrunk model as JSON, and a model built anew cut the same way; every entry is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.deploy.attention import narrow_attention_
from secateur.deploy.naming import of_torch
from secateur.deploy.shrunk import Axis, Shrunk
from secateur.deploy.slices import Index, sliced_copy
from secateur.deploy.slots import ATTRIBUTE, Slot, numbers_of, write_
from secateur.deploy.width import Width
from secateur.errors import InputError, nearest

__all__ = ["cut", "follow_torch_", "from_json", "to_json"]


def to_json(note: Shrunk) -> dict[str, Any]:
    """What `cut` needs, as plain JSON: kept positions as runs, integers with their places."""
    return {
        "class": note.like,
        "config": note.config,
        "difference": note.difference,
        "checked": list(note.checked),
        "axes": [dict(vars(axis)) for axis in note.axes],
        "kept": {
            name: [None if positions is None else _runs(positions) for positions in index]
            for name, index in note.index.items()
        },
        "numbers": [
            {
                "module": slot.module,
                "path": list(slot.path),
                "old": int(old),
                "new": int(new),
                "scale": isinstance(new, Width),
            }
            for slot, (old, new) in note.numbers.items()
        ],
    }


def _runs(positions: Tensor) -> list[list[int]]:
    """Ascending positions as [first, one after last] pairs."""
    values = positions.tolist()
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(values), 1) if b != a + 1)]
    return [[values[a], values[b - 1] + 1] for a, b in pairwise([*starts, len(values)])]


def from_json(text: Any, model: nn.Module) -> Shrunk:
    """Read cuts against the model that they are cuts of.

    Args:
        text: Parsed JSON, trusted in nothing.
        model: As it was built, before any cut; on the meta device it costs no memory.

    Raises:
        InputError: another class; unknown tensors or integers; positions out of order or out of range.
    """
    if not isinstance(text, dict):
        raise InputError(f"cuts: expected an object, found {type(text).__name__}.")
    if text.get("class") != type(model).__name__:
        raise InputError(
            f"class: the cuts are of {text.get('class')!r}, and the model is {type(model).__name__}."
        )
    difference: Any = text.get("difference")
    if type(difference) not in (int, float) or not math.isfinite(difference):
        raise InputError("difference: expected a number.")
    checked = _list(text, "checked")
    if not all(isinstance(words, str) for words in checked):
        raise InputError("checked: expected words.")
    config = text.get("config")
    if config is not None and not isinstance(config, dict):
        raise InputError("config: expected an object or null.")
    known = numbers_of(model)
    return Shrunk(
        tuple(_axis(entry) for entry in _list(text, "axes")),
        _index(text.get("kept"), model),
        {},
        dict(_number(entry, known, type(model).__name__) for entry in _list(text, "numbers")),
        float(difference),
        tuple(checked),
        (sum(p.numel() for p in model.parameters()), 0),
        type(model).__name__,
        config,
    )


def _list(text: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(text.get(key), list):
        raise InputError(f"{key}: expected a list.")
    return text[key]


def _index(text: Any, model: nn.Module) -> Index:
    if not isinstance(text, dict):
        raise InputError("kept: expected an object.")
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    index: dict[str, tuple[Tensor | None, ...]] = {}
    for name, dims in text.items():
        if name not in tensors:
            raise InputError(f"kept: {type(model).__name__} has no tensor {name!r}; {nearest(name, tensors)}.")
        shape = tensors[name].shape
        if not isinstance(dims, list) or len(dims) != len(shape):
            raise InputError(f"kept: {name} has {len(shape)} dimensions, expected a list of as many entries.")
        index[name] = tuple(
            None if runs is None else _positions(runs, size, f"{name}, dimension {dim}")
            for dim, (runs, size) in enumerate(zip(dims, shape, strict=True))
        )
    return index


def _positions(runs: Any, size: int, where: str) -> Tensor:
    flat = [end for run in runs for end in run] if _pairs(runs) else []
    ordered = all(a < b for a, b in zip(flat[::2], flat[1::2], strict=True))
    apart = all(a < b for a, b in zip(flat[1:-1:2], flat[2::2], strict=True))
    if not flat or not ordered or not apart or flat[0] < 0 or flat[-1] > size:
        raise InputError(f"kept: {where}: expected ascending runs [first, end) within 0 to {size}.")
    return torch.cat([torch.arange(a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)])


def _pairs(runs: Any) -> bool:
    if not isinstance(runs, list):
        return False
    return all(isinstance(r, list) and len(r) == 2 and all(type(end) is int for end in r) for r in runs)


def _number(entry: Any, known: Mapping[Slot, int], name: str) -> tuple[Slot, tuple[int, int]]:
    path = entry.get("path") if isinstance(entry, dict) else None
    words = isinstance(path, list) and path and all(type(step) in (str, int) for step in path)
    if not words or not isinstance(entry.get("module"), str):
        raise InputError("numbers: expected entries with a module and a path of attribute names and positions.")
    slot = Slot(entry["module"], tuple(path))  # type: ignore[arg-type]
    old, new, scale = entry.get("old"), entry.get("new"), entry.get("scale")
    if type(old) is not int or type(new) is not int or not 1 <= new <= old or type(scale) is not bool:
        raise InputError(
            f"numbers: {slot}: expected old and new with 1 <= new <= old, and whether it is a scale."
        )
    if known.get(slot) != old:
        raise InputError(f"numbers: {slot}: {name} is built with {known.get(slot)} there instead of {old}.")
    return slot, (old, Width(new, old) if scale else new)


def _axis(entry: Any) -> Axis:
    kinds = {"name": str, "kind": str, "size": int, "kept": int, "width": int, "exact": bool, "reason": str}
    if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != kinds:
        raise InputError(f"axes: expected entries with {', '.join(kinds)}.")
    return Axis(**entry)


def cut(model: nn.Module, note: Shrunk) -> nn.Module:
    """A copy of a model with the cuts that were made in another of its kind; nothing is checked by running it.

    Args:
        model: Of the class and sizes of the one that was shrunk; on the meta device it costs no memory.
        note: What was done to that one, such as from `from_json`.
    """
    small = sliced_copy(model, note.index, note.zeros)
    write_(small, {slot: new for slot, (_, new) in note.numbers.items()})
    follow_torch_(small, model)
    count = sum(p.numel() for p in small.parameters())
    vars(small)[ATTRIBUTE] = replace(note, parameters=(note.parameters[0], count))
    return small


def follow_torch_(small: nn.Module, model: nn.Module) -> None:
    """Let torch's own layers remember the sizes of their sliced tensors.

    Args:
        small: Changed in place.
        model: The one it was cut from.
    """
    for path, module in small.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            whole: Any = model.get_submodule(path)
            narrow_attention_(module, int(whole.head_dim))
        for name, size in of_torch(module).items():
            setattr(module, name, size)
