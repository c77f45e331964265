"""The pruned files while they are written: full size from the start, each tensor put in its place, a journal.

Every shard has the source's header byte by byte, so each tensor keeps its offset; masks lie in one file whose layout
is known before the first is found. So units (a layer, or a tensor that stays as it is) may be written in any order,
and writing one twice does no harm: a killed run goes on with the units that the journal does not list.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.masks import FORMAT
from secateur.stream.journal import Journal
from secateur.stream.shards import Shards

__all__ = ["Output"]

_INTERVAL = 1 << 28  # bytes written between two entries of the journal


class Output:
    """The folder's weight files and masks.

    Args:
        folder: where to write.
        shards: the source, whose headers are kept.
        masked: parameter name -> shape of everything that gets a mask.
        journal: says which units are there already.
    """

    def __init__(self, folder: Path, shards: Shards, masked: Mapping[str, tuple[int, ...]], journal: Journal):
        self.shards, self.journal = shards, journal
        self._open: dict[str, FileIO] = {}
        self._pending: dict[str, Any] = {}
        self._bytes = 0
        heads = {name: (head, shards.sizes[name]) for name, head in shards.heads.items()}
        (folder / "run").mkdir(exist_ok=True)
        head, self._mask_places, size = _mask_layout(masked)
        heads["run/masks.safetensors"] = (head, size)
        try:
            for name, (head, size) in heads.items():
                self._open[name] = _prepared(folder / name, head, size)
        except BaseException:
            self.close()
            raise

    def copy(self, name: str) -> None:
        """Take a stored tensor over as it is."""
        file = self._open[self.shards.tensors[name].file]
        for at, piece in self.shards.pieces(name):
            _put(file, at, memoryview(piece))
            self._bytes += len(piece)

    def write(self, name: str, values: Tensor) -> None:
        """Put new values in a stored tensor's place."""
        stored = self.shards.tensors[name]
        content = values.contiguous().reshape(-1).view(torch.uint8)
        if content.numel() != stored.size:
            raise ValueError(f"{name}: {content.numel()} bytes for a place of {stored.size}")
        _put(self._open[stored.file], stored.begin, content.numpy().data)
        self._bytes += stored.size

    def write_mask(self, name: str, mask: Tensor) -> None:
        """Put a mask in its place, one bit a weight."""
        bits = np.packbits(mask.contiguous().numpy().reshape(-1))
        _put(self._open["run/masks.safetensors"], self._mask_places[name], bits.data)

    def finished(self, unit: str, found: Any) -> None:
        """A unit is written; the journal hears of it once enough is on the disk."""
        self._pending[unit] = found
        if self._bytes >= _INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Let the disk take everything, then tell the journal."""
        for file in self._open.values():
            os.fsync(file.fileno())
        if self._pending:
            self.journal.add(self._pending)
        self._pending, self._bytes = {}, 0

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()


def _prepared(path: Path, head: bytes, size: int) -> FileIO:
    """A file of full size: a disk that is too small says so before any work is done."""
    fresh = not path.is_file() or path.stat().st_size != size
    file = open(path, "w+b" if fresh else "r+b", buffering=0)  # noqa: SIM115 - `close` does
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
        _put(file, 0, memoryview(head))
    except BaseException:
        file.close()
        raise
    return file


def _put(file: FileIO, at: int, content: memoryview) -> None:
    """Write all of it; one call of the system takes at most 2 GB."""
    done = 0
    while done < len(content):
        done += os.pwrite(file.fileno(), content[done:], at + done)


def _mask_layout(masked: Mapping[str, tuple[int, ...]]) -> tuple[bytes, dict[str, int], int]:
    """Header of the mask file, offset of each mask's first byte, and the file's size; see `Masks.save`."""
    shapes = json.dumps({name: list(shape) for name, shape in masked.items()})
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "shapes": shapes}}
    at = 0
    for name, shape in masked.items():
        size = (prod(shape) + 7) // 8
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    places = {name: len(head) + entry["data_offsets"][0] for name, entry in entries.items() if name in masked}
    return head, places, len(head) + at
