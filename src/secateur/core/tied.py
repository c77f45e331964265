"""Parameters that share memory: pruning one changes the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["contains", "same_tensor", "tied_names"]


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other names of every parameter that has any: the same parameter, or one whose memory overlaps.

    Views that lie side by side in one buffer are not tied; a slice of another parameter is.

    Cost: no copies; a boolean per element only where two strided views interleave.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(9, 2))
        >>> model[1].weight = model[0].weight
        >>> tied_names(model)
        {'0.weight': ('1.weight',), '1.weight': ('0.weight',)}
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    order = {name: index for index, name in enumerate(name for group in names.values() for name in group)}
    shared = {key: list(group) for key, group in names.items()}
    for one, other in _overlapping(list(tensors.values())):
        shared[id(one)] += names[id(other)]
        shared[id(other)] += names[id(one)]
    return {
        name: tuple(sorted((other for other in shared[key] if other != name), key=order.__getitem__))
        for key, group in names.items()
        for name in group
        if len(shared[key]) > 1
    }


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same elements in the same order, so that one mask holds for both."""
    if one is other:
        return True
    home = _home(one)
    alike = (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    return (
        home is not None and home == _home(other) and alike and one.storage_offset() == other.storage_offset()
    )


def contains(outer: Tensor, inner: Tensor) -> bool:
    """Whether every element of `inner` is an element of `outer`, as far as their outlines show."""
    if outer is inner:
        return True
    home = _home(outer)
    if home is None or home != _home(inner) or not _dense(outer):
        return False
    (first, end), (start, stop) = _span(outer), _span(inner)
    return first <= start and stop <= end


def _overlapping(tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of different parameters that have an element in common."""
    homes: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        home = _home(tensor)
        if home is not None and tensor.numel():
            homes.setdefault(home, []).append(tensor)
    for group in homes.values():
        group.sort(key=_span)
        for index, one in enumerate(group):
            for other in group[index + 1 :]:
                if _span(other)[0] >= _span(one)[1]:
                    break
                if _meet(one, other):
                    yield one, other


def _home(tensor: Tensor) -> tuple | None:
    """What identifies the memory; None where there is none to share: on the meta device, in wrapper classes."""
    if tensor.is_meta:
        return None
    try:
        address = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    return (tensor.device, address) if address else None


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one after the last, counted from the start of the storage."""
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (int(reach) + 1) * size


def _dense(tensor: Tensor) -> bool:
    start, stop = _span(tensor)
    return stop - start == tensor.numel() * tensor.element_size()


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors whose spans overlap have an element in common; interleaved slices may not."""
    if (_dense(one) and _dense(other)) or contains(one, other) or contains(other, one):
        return True
    if one.element_size() != other.element_size():
        return True
    first = min(one.storage_offset(), other.storage_offset())
    size = one.element_size()
    taken = torch.zeros(max(_span(one)[1], _span(other)[1]) // size - first, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), one.storage_offset() - first).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset() - first).any())
