"""Which stored tensors make up each parameter: one of the same name, one of another, or one for each expert.

transformers may hold a parameter under another name than the files do (a prefix more or less, renamed modules) and
may stack what the files hold apart (experts). Its own table says how; here that table becomes pieces, each with its
place in the parameter, so that reading assembles and writing takes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.core.masks import named_parameters
from secateur.core.tied import tied_names
from secateur.errors import InputError, UsageError
from secateur.stream.architecture import Architecture
from secateur.stream.shards import FLOATING, Shards

__all__ = ["Piece", "Places", "find_places"]

Region = tuple[Any, ...]
Order = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """A stored tensor and the region of the parameter that it fills."""

    name: str
    region: Region = ()


@dataclass(frozen=True)
class Places:
    """The pieces of every parameter and of every buffer that is stored.

    Attributes:
        shards: the files.
        pieces: parameter or buffer name -> its pieces.
        copies: parameter name -> further stored tensors that hold all of it (tied tensors stored twice).
        unclear: parameter name -> why its pieces cannot be told.
        shapes: name -> shape.
        orders: parameter name -> how its slices change places, one after the other, whenever it is read.
    """

    shards: Shards
    pieces: Mapping[str, tuple[Piece, ...]]
    copies: Mapping[str, tuple[str, ...]]
    unclear: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    orders: Mapping[str, Sequence[Order]] = field(default_factory=dict)

    def check(self, names: Iterable[str]) -> None:
        """Raise unless every one of these parameters can be read and written.

        Raises:
            InputError: a parameter is missing in the files, or has another shape there.
            UsageError: it is stored in a form that cannot be taken apart.
        """
        for name in names:
            if name in self.unclear:
                raise UsageError(f"{name}: {self.unclear[name]}")
            if name not in self.pieces:
                raise InputError(
                    f"{self.shards.folder}: no weight file holds {name}, which the config says is there; "
                    "restore or download them again."
                )
            filled = sum(self.shards.tensors[piece.name].elements for piece in self.pieces[name])
            found = [self.shards.tensors[piece.name].shape for piece in self.pieces[name]]
            shape = self.shapes[name]
            if filled != torch.Size(shape).numel() or (len(found) == 1 and found[0] != shape):
                raise InputError(
                    f"{self.shards.folder}: {name} is stored with shape {', '.join(map(str, found[:2]))} instead of "
                    f"{shape}; config.json and the weight files do not belong together."
                )

    def kind(self, name: str) -> torch.dtype:
        """The type in which a parameter is stored."""
        return FLOATING[self.shards.tensors[self.pieces[name][0].name].kind]

    def read(self, name: str) -> Tensor:
        """A whole parameter, in the type in which it is stored, its slices in order."""
        whole = self._as_stored(name)
        for order in self.orders.get(name, ()):
            whole = order(whole)
        return whole

    def _as_stored(self, name: str) -> Tensor:
        pieces = self.pieces[name]
        if len(pieces) == 1 and not pieces[0].region:
            return self.shards.read(pieces[0].name)
        whole = torch.empty(self.shapes[name], dtype=self.kind(name))
        for piece in pieces:
            whole[piece.region] = self.shards.read(piece.name)
        return whole

    def parts(self, name: str, whole: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Stored name and values of every tensor that holds a part of this parameter, copies included."""
        for piece in self.pieces[name]:
            yield piece.name, whole[piece.region] if piece.region else whole
        for copy in self.copies.get(name, ()):
            yield copy, whole


def find_places(architecture: Architecture, shards: Shards) -> Places:
    """Find the pieces of every parameter of the model."""
    model = architecture.model
    tensors = {**named_parameters(model), **dict(model.named_buffers())}
    pieces: dict[str, list[Piece]] = {}
    unclear: dict[str, str] = {}
    experts: dict[tuple[str, int], list[str]] = {}
    converters: dict[str, Any] = {}
    rename = _renamer(model) if architecture.known else lambda name: (name, None, 0)
    for stored in shards.tensors:
        name, converter, slot = rename(stored)
        if converter is None:
            pieces.setdefault(name, []).append(Piece(stored))
        else:
            converters[name] = converter
            experts.setdefault((name, slot), []).append(stored)
    for name, converter in converters.items():
        found = _stacked(name, converter, experts, shards)
        if found is None:
            operations = ", ".join(type(operation).__name__ for operation in converter.operations)
            unclear[name] = (
                f"transformers builds it from other tensors ({operations}), which is not undone here; skip it with "
                f'skip="{name}", or prune the model in memory'
            )
        else:
            pieces[name] = found
    for alias, kept in shards.tied.items():
        pieces.setdefault(alias, list(pieces.get(kept, ())))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Places(shards, *_with_ties(model, pieces), unclear, shapes)


def _with_ties(model: Any, pieces: dict[str, list[Piece]]) -> tuple[dict, dict]:
    """Tied parameters have the pieces of whichever name is stored; where several are, the rest are copies."""
    whole = {name: tuple(found) for name, found in pieces.items() if found}
    copies: dict[str, tuple[str, ...]] = {}
    for name, others in tied_names(model).items():
        stored = [piece.name for twin in (name, *others) for piece in pieces.get(twin, ())]
        if stored:
            first = pieces[name] if name in pieces else [Piece(stored[0])]
            whole[name] = tuple(first)
            own = {piece.name for piece in first}
            copies[name] = tuple(twin for twin in dict.fromkeys(stored) if twin not in own)
    return whole, copies


def _renamer(model: Any) -> Any:
    """stored name -> (name in the model, converter or None, slot of the converter's sources)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: Any = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()

    def rename(stored: str) -> tuple[str, Any, int]:
        if stored in state:
            return stored, None, 0
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            return name, None, 0
        converter = next(c for c in converters if pattern in c.source_patterns)
        return name, converter, converter.source_patterns.index(pattern)

    return rename


def _stacked(
    name: str, converter: Any, experts: Mapping[tuple[str, int], list[str]], shards: Shards
) -> list[Piece] | None:
    """Experts stored apart: stacked along a new first axis, gate and up one below the other."""
    from transformers.core_model_loading import dot_natural_key

    operations = [type(operation).__name__ for operation in converter.operations]
    slots = range(len(converter.source_patterns))
    merged = operations[:1] == ["MergeModulelist"] and converter.operations[0].dim == 0
    joined = operations[1:] == ["Concatenate"] and converter.operations[1].dim == 1
    if not merged or not (joined or (len(operations) == 1 and len(slots) == 1)):
        return None
    pieces, row = [], 0
    for slot in slots:
        stored = sorted(experts.get((name, slot), ()), key=dot_natural_key)
        if not stored:
            return None
        rows = shards.tensors[stored[0]].shape[0]
        region = (slice(row, row + rows),) if joined else ()
        pieces += [Piece(tensor, (expert, *region)) for expert, tensor in enumerate(stored)]
        row += rows
    return pieces
