"""How much memory a run will need, told before it starts; constants are measured, see bench/stream.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from secateur.core.masks import named_parameters
from secateur.core.where import Layer
from secateur.errors import ResourceError, UsageError
from secateur.recover import ADMM, ALPS, IntoBias, LeastSquares, SparseGPT, Swaps
from secateur.stream.stages import in_parts
from secateur.stream.tensors import Work
from secateur.stream.walk import Call, bytes_held, find_decoder

__all__ = ["Need", "check_calls", "needed", "parse_memory", "tokens_of", "told", "walking_need"]

BASE = 500 << 20  # bytes of Python, torch and transformers
WEIGHT = 14  # bytes of work for each weight of a layer that is scored: as stored, float32, scores, marks
# update -> matrices (in, in) and (out, in), float32, alive at once while a layer is solved
SOLVING = {SparseGPT: (5, 8), LeastSquares: (5, 8), ADMM: (7, 12), ALPS: (11, 11)}
UNKNOWN = (12, 12)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_memory(memory: str | int | None) -> int | None:
    """An amount of memory in bytes.

    Example:
        >>> parse_memory("16 GB"), parse_memory("1.5GiB"), parse_memory(None)
        (16000000000, 1610612736, None)
    """
    if memory is None or (isinstance(memory, int) and memory > 0):
        return memory
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(memory).strip().lower())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise UsageError(f'memory is {memory!r}; expected an amount such as "16 GB" or "900 MiB"')
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Need:
    """The moment at which a run needs most memory.

    Attributes:
        size: bytes, about.
        what: what takes them.
        advice: what to do where there are fewer.
    """

    size: int
    what: str
    advice: str

    def __str__(self) -> str:
        return f"about {told(self.size)}, at {self.what}"

    def check(self, budget: int | None) -> None:
        """Raise ResourceError where it is more than allowed."""
        if budget is not None and budget < BASE:
            raise ResourceError(
                f"Python, torch and transformers alone take about {told(BASE)}, and {told(budget)} are allowed"
            )
        if budget is not None and self.size > budget:
            raise ResourceError(
                f"{self.what} takes about {told(self.size)} in all, and {told(budget)} are allowed. Allow more, or "
                f"{self.advice}"
            )


def needed(work: Work, batches: Sequence[Any] | None) -> Need:
    """The largest need of a run, from shapes alone."""
    layers = work.todo.layers
    largest = max(layers, key=lambda layer: layer.size)
    found = [
        Need(
            BASE + WEIGHT * largest.size,
            f"scoring the {largest.size:,} weights of {largest.name}",
            f'skip it with skip="{largest.path}"',
        )
    ]
    if batches is not None:
        found += _walking(work, batches)
    return max(found, key=lambda need: need.size)


def walking_need(work: Work, batches: Sequence[Any]) -> Need:
    """The largest need of walking the blocks."""
    return max(_walking(work, batches), key=lambda need: need.size)


def check_calls(calls: Sequence[Call], budget: int | None) -> None:
    """Refuse masks that leave no memory for the rest; padding makes one for every pair of tokens."""
    held = bytes_held(calls)
    if budget is not None and BASE + held > budget:
        raise ResourceError(
            f"attention masks of the calibration data take {told(held)} of the {told(budget)} allowed. Give "
            "sequences without padding, or fewer or shorter ones"
        )


def _walking(work: Work, batches: Sequence[Any]) -> list[Need]:
    """The embedding part, and the block that needs most."""
    decoder = find_decoder(work.model, work.todo.layers)
    own = {f"{decoder.path}."}
    head = work.model.get_output_embeddings()
    own |= {f"{path}." for path, module in work.model.named_modules() if module is head}
    outside = [name for name in named_parameters(work.model) if not name.startswith(tuple(own))]
    embedding = BASE + sum(_bytes(work, name) for name in outside)
    found = [Need(embedding, "the embedding of the calibration data", "prune on a larger machine")]
    parts = batches if work.todo.recipe.update is None else in_parts(batches)
    for number, block in enumerate(decoder.blocks):
        chosen = decoder.layers_of(work.todo.layers, number)
        names = [f"{decoder.path}.{number}.{name}" for name in named_parameters(block)]
        size = BASE + sum(_bytes(work, name) for name in names) + _flowing(work, chosen, parts)
        if work.todo.recipe.update is None:
            found.append(
                Need(size, f"block {number} and what flows through it", "give shorter or smaller batches")
            )
        elif chosen:
            hardest = max(chosen, key=lambda layer: _solving(work, layer))
            found.append(Need(size + _solving(work, hardest), *_about(hardest)))
    return found


def _about(layer: Layer) -> tuple[str, str]:
    part, _, columns = layer.layout.shape
    moment = f"{part} x " * (part > 1) + told(4 * columns**2)
    what = f"the weight update of {layer.name} (the second moment of its {columns:,} inputs is {moment})"
    return what, f'skip it with skip="{layer.path}", or choose a recipe without a weight update, as wanda'


def _solving(work: Work, layer: Layer) -> int:
    part, out, columns = layer.layout.shape
    squares, weights = _matrices(work.todo.recipe.update)
    if part > 1:
        squares += 2 * part
    return 4 * (squares * columns**2 + weights * out * columns + 2 * (part > 1) * layer.size)


def _matrices(update: Any) -> tuple[int, int]:
    """Matrices `(in, in)` and `(out, in)` that an update holds, with what it wraps."""
    if not isinstance(update, IntoBias | Swaps):
        return SOLVING.get(type(update), UNKNOWN)
    squares, weights = (5, 8) if update.then is None else _matrices(update.then)
    return squares + 2, weights + 2


def _flowing(work: Work, layers: Iterable[Layer], parts: Sequence[Any]) -> int:
    """Activations of the largest part between two layers of a block."""
    tokens = max((tokens_of(part) for part in parts), default=0)
    config = getattr(work.model.config, "get_text_config", lambda: work.model.config)()
    wide = getattr(config, "hidden_size", 0)
    widest = max((max(layer.layout.shape[1:]) for layer in layers), default=wide)
    return 4 * tokens * (4 * wide + 3 * widest)


def tokens_of(batch: Any) -> int:
    """Positions of a batch of token ids, or of the first tensor in it."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids", next((v for v in batch.values() if isinstance(v, Tensor)), None))
    elif isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    return prod(batch.shape[:2]) if isinstance(batch, Tensor) else 0


def _bytes(work: Work, name: str) -> int:
    """A parameter in float32, and as it is stored: its successor is read meanwhile."""
    shape, pieces = work.places.shapes[name], work.places.pieces.get(name, ())
    return 4 * prod(shape) + sum(work.places.shards.tensors[piece.name].size for piece in pieces)


def told(size: float) -> str:
    """An amount of memory as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
