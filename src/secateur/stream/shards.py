"""Where every tensor of a checkpoint lies, found from the headers alone; tensors are read one at a time.

Files are read with ordinary reads into a buffer of the tensor's size and never mapped, so that what is resident
is what is being worked on.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoint import Checkpoint
from secateur.errors import InputError, UsageError

__all__ = ["FLOATING", "Shards", "Stored", "open_shards", "read_into"]

FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PIECE = 1 << 24  # bytes copied at a time


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        file: the file's name.
        kind: type in safetensors' spelling.
        shape: its shape.
        begin: offset of its first byte in the file.
        size: bytes.
    """

    file: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def elements(self) -> int:
        """Numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shards:
    """The weight files of a checkpoint.

    Attributes:
        folder: where they lie.
        heads: file name -> everything before the first tensor, byte by byte.
        sizes: file name -> bytes.
        tensors: name -> where it lies, in the order of files and offsets.
        tied: other name -> name of tensors that the files hold once.
    """

    folder: Path
    heads: Mapping[str, bytes]
    sizes: Mapping[str, int]
    tensors: Mapping[str, Stored]
    tied: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor, in the type in which it is stored.

        Raises:
            InputError: the file ends too early, or the tensor is of a type that is not pruned.
        """
        stored = self.tensors[name]
        if stored.kind not in FLOATING:
            raise UsageError(f"{name}: stored as {stored.kind}, which is no floating-point type that is pruned")
        data = torch.empty(stored.size, dtype=torch.uint8)
        path = self.folder / stored.file
        try:
            done = read_into(path, stored.begin, data)
        except OSError as error:
            raise InputError(f"{path}: {name} cannot be read ({error.strerror}); restore the file.") from error
        if done < stored.size:
            raise InputError(f"{path}: ends inside {name}; restore or download it again.")
        return data.view(FLOATING[stored.kind]).reshape(stored.shape)

    def pieces(self, name: str) -> Iterator[tuple[int, bytes]]:
        """The bytes of one tensor, whatever its type, in pieces with their offsets in the file."""
        stored, path = self.tensors[name], self.folder / self.tensors[name].file
        at, end = stored.begin, stored.begin + stored.size
        while at < end:
            piece = torch.empty(min(_PIECE, end - at), dtype=torch.uint8)
            try:
                done = read_into(path, at, piece)
            except OSError as error:
                raise InputError(f"{path}: {name} cannot be read ({error.strerror}); restore it.") from error
            if done < len(piece):
                raise InputError(f"{path}: ends inside {name}; restore or download it again.")
            yield at, piece.numpy().tobytes()
            at += done


def read_into(path: Path, start: int, values: Tensor) -> int:
    """Fill a contiguous tensor from a file; the bytes read, fewer than it holds where the file ends."""
    view, done = memoryview(values.reshape(-1).view(torch.uint8).numpy().data), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while done < len(view) and (count := file.readinto(view[done:])):
            done += count
    return done


def open_shards(checkpoint: Checkpoint) -> Shards:
    """Read the headers of files that `read_checkpoint` has found sound.

    Raises:
        UsageError: the weights are pickles.
        InputError: two files hold a tensor of one name.
    """
    if checkpoint.pickled:
        raise UsageError(f"{checkpoint.folder}: only safetensors can be streamed; convert the weights first")
    heads: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    tensors: dict[str, Stored] = {}
    tied: dict[str, str] = {}
    for path in checkpoint.weights:
        head, content = _header(path)
        heads[path.name], sizes[path.name] = head, path.stat().st_size
        tied |= _tied(content.pop("__metadata__", None) or {})
        for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
            if name in tensors:
                raise InputError(f"{path}: holds {name}, which {tensors[name].file} holds as well.")
            first, last = entry["data_offsets"]
            place = len(head) + first
            tensors[name] = Stored(path.name, entry["dtype"], tuple(entry["shape"]), place, last - first)
    return Shards(checkpoint.folder, heads, sizes, tensors, tied)


def _header(path: Path) -> tuple[bytes, dict[str, Any]]:
    with open(path, "rb") as file:
        length = file.read(8)
        text = file.read(struct.unpack("<Q", length)[0])
    return length + text, json.loads(text)


def _tied(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(metadata.get("tied", "{}"))
    except (ValueError, RecursionError):
        return {}
    return {str(alias): str(name) for alias, name in found.items()} if isinstance(found, dict) else {}
