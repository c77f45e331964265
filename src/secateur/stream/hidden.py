"""The hidden states between two blocks, in a file: memory holds those of one batch at a time.

They are what a killed run goes on from, so they have to be on the disk anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import InputError
from secateur.stream.journal import ANEW
from secateur.stream.shards import read_into

__all__ = ["Hidden", "write_hidden"]


class Hidden:
    """Hidden states of each batch, float32, read when asked for.

    Args:
        path: a file that `write_hidden` wrote.
        shapes: of each batch, `(sequence, token, channel)`.

    Raises:
        InputError: no such file, or one of another size.
    """

    def __init__(self, path: Path, shapes: Sequence[torch.Size]):
        self.path, self.shapes = path, shapes
        size = 4 * sum(shape.numel() for shape in shapes)
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"{path}: missing or damaged, so the interrupted run cannot be continued; {ANEW}")

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, batch: int) -> Tensor:
        """The hidden states of one batch."""
        values = torch.empty(self.shapes[batch])
        start = 4 * sum(shape.numel() for shape in self.shapes[:batch])
        if read_into(self.path, start, values) < 4 * values.numel():
            raise InputError(f"{self.path}: ends too early; {ANEW}")
        return values


@contextmanager
def write_hidden(path: Path) -> Iterator[Callable[[Tensor], None]]:
    """A function that appends one batch after the other; the file has its name once all are on the disk."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb", buffering=0) as file:

        def append(states: Tensor) -> None:
            view, done = states.float().contiguous().reshape(-1).view(torch.uint8).numpy().data, 0
            while done < len(view):
                done += file.write(view[done:])

        yield append
        os.fsync(file.fileno())
    os.replace(beside, path)
