"""A safetensors file written one tensor at a time: the bytes that the library writes with all of them in memory."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["write_tensors"]

# type -> its name in the files; wider ones lie first, which is what safetensors does
_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip
_PIECE = 1 << 26  # bytes written and hashed at a time

Kind = tuple[torch.dtype, tuple[int, ...]]


def write_tensors(
    path: Path, kinds: Mapping[str, Kind], give: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> str:
    """Write a file whose tensors are asked for one after another.

    Args:
        path: the file.
        kinds: name -> type and shape of every tensor; floating-point types only.
        give: called with each name once, in the order in which they lie in the file.
        metadata: of the header.

    Returns:
        The SHA-256 of the file.

    Cost: memory for one tensor.
    """
    order = list(_KINDS)
    names = sorted(kinds, key=lambda name: (order.index(kinds[name][0]), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        kind, shape = kinds[name]
        size = prod(shape) * kind.itemsize
        entries[name] = {"dtype": _KINDS[kind], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def put(content: Any) -> None:
            digest.update(content)
            done = 0
            while done < len(content):
                done += file.write(content[done:])

        put(struct.pack("<Q", len(text)) + text)
        for name in names:
            value = give(name)
            if (value.dtype, tuple(value.shape)) != kinds[name]:
                raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)}, announced as {kinds[name]}")
            view = memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(view), _PIECE):
                put(view[start : start + _PIECE])
    return digest.hexdigest()
