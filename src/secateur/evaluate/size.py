"""How big a model is: parameters, non-zeros, bytes in memory and bytes on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.measurement import Measurement

__all__ = ["disk_bytes", "nonzeros", "parameters", "state_bytes"]

_AT_ONCE = 1 << 24
"""Elements compared with zero at a time: a comparison makes one byte each."""


def parameters(model: nn.Module, *, trainable: bool = False) -> Measurement:
    """How many parameters a model has; tied ones are counted once.

    Args:
        model: any model, on the meta device too.
        trainable: count only those that need a gradient.

    Example:
        >>> print(parameters(nn.Linear(3, 2)))
        parameters 8 (2 tensors)
    """
    found = _distinct(tensor for tensor in model.parameters() if tensor.requires_grad or not trainable)
    name = "trainable_parameters" if trainable else "parameters"
    return Measurement(name, sum(tensor.numel() for tensor in found), "1", {"tensors": len(found)})


def nonzeros(model: nn.Module) -> Measurement:
    """How many parameters are not zero; tied ones are counted once, NaN counts as not zero.

    Raises:
        UsageError: the model is on the meta device and has no values.

    Cost: one read of all parameters.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, -0.0, 3.0]])), layer.bias.fill_(1)
        >>> print(nonzeros(layer))
        nonzeros 5 (2 tensors, of 8)
    """
    found = _distinct(model.parameters())
    if any(tensor.is_meta for tensor in found):
        raise UsageError("a model on the meta device has no values to count; load its weights first")
    total = sum(tensor.numel() for tensor in found)
    count = sum(_nonzeros(tensor.detach()) for tensor in found)
    return Measurement("nonzeros", count, "1", {"tensors": len(found), "of": total})


def state_bytes(model: nn.Module) -> Measurement:
    """Bytes of the parameters and buffers that `state_dict` holds, in memory; tied ones are counted once.

    Example:
        >>> print(state_bytes(nn.Linear(3, 2)))
        state_bytes 32 bytes (2 tensors)
    """
    entries = model.state_dict(keep_vars=True).values()
    found = _distinct(part for entry in entries if isinstance(entry, Tensor) for part in _parts(entry))
    size = sum(tensor.numel() * tensor.element_size() for tensor in found)
    return Measurement("state_bytes", size, "bytes", {"tensors": len(found)})


def disk_bytes(path: str | os.PathLike[str], pattern: str = "*") -> Measurement:
    """Bytes of a file, or of all files in a folder and below; a file with two names is counted once.

    The sum of file sizes, as a download or an archive without compression would need; not rounded up to
    blocks. Links to files are followed, links to folders are not.

    Args:
        path: a file or a folder.
        pattern: count only files whose name matches, for instance `*.safetensors`.

    Raises:
        UsageError: the path does not exist, or nothing in it matches.
    """
    place = Path(path)
    if not place.exists():
        raise UsageError(f"{place}: no such file or folder")
    entries = [place] if place.is_file() else _files(place)
    sizes: dict[tuple[int, int], int] = {}
    for entry in entries:
        if place.is_file() or entry.match(pattern):
            status = entry.stat()
            sizes[status.st_dev, status.st_ino] = status.st_size
    if not sizes:
        raise UsageError(f"{place}: no file matches {pattern!r}")
    # The path stays out of the conditions: a report may be published.
    return Measurement("disk_bytes", sum(sizes.values()), "bytes", {"files": len(sizes), "pattern": pattern})


def _files(folder: Path) -> list[Path]:
    found = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return [entry for entry in found if entry.is_file()]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a composed one (torchao's integers and scales) is made of; a plain one itself."""
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that do not view the same memory in the same way; tied parameters may be two objects."""
    seen: dict[object, Tensor] = {}
    for tensor in tensors:
        key: object = id(tensor)
        composed = len(_parts(tensor)) > 1
        if not tensor.is_meta and tensor.layout == torch.strided and tensor.numel() and not composed:
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        seen.setdefault(key, tensor)
    return list(seen.values())


def _nonzeros(tensor: Tensor) -> int:
    if hasattr(tensor, "dequantize") and len(_parts(tensor)) > 1:
        tensor = tensor.dequantize()
    if tensor.numel() <= _AT_ONCE or not tensor.is_contiguous():
        return int(torch.count_nonzero(tensor))
    return sum(int(torch.count_nonzero(part)) for part in tensor.view(-1).split(_AT_ONCE))
