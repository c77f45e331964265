"""Masks: which weights are kept. They live outside the model, so state_dict keys never change.

`True` means kept. The weights themselves hold the zeros, so a pruned model saves, compiles and loads
like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core import native
from secateur.core.forward import unwrapped
from secateur.core.sharded import local, shard_like
from secateur.core.stored import save_tensors
from secateur.errors import InputError, UsageError, nearest

__all__ = ["Masks", "undo_"]

FORMAT = "secateur.masks.v1"
# bytes of an element -> the integers that hold its bits
CACHED = 1 << 17  # weights whose passes stay in the cache of one core
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Masks(Mapping[str, Tensor]):
    """An immutable mapping from parameter names to boolean tensors, True = kept.

    Args:
        kept: parameter name -> boolean tensor of the parameter's shape.
        originals: the weights before pruning, and biases that changed with them, for `undo_`; empty when
            they were not kept.

    Example:
        >>> masks = Masks({"weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.sparsity, masks.zeros, masks.size
        (0.25, 1, 4)
        >>> (masks & masks) == masks
        True
    """

    def __init__(self, kept: Mapping[str, Tensor], originals: Mapping[str, Tensor] | None = None):
        for name, mask in kept.items():
            if mask.dtype != torch.bool:
                raise UsageError(
                    f"mask of {name}: expected a boolean tensor, got {mask.dtype}; True means kept"
                )
        self._kept = dict(kept)
        self.originals: Mapping[str, Tensor] = dict(originals or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(mask, other[name]) for name, mask in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.zeros:,} of {self.size:,} pruned, sparsity {self.sparsity:.4f})"

    @property
    def size(self) -> int:
        """Number of masked positions, kept or not."""
        return sum(mask.numel() for mask in self.values())

    @property
    def zeros(self) -> int:
        """Number of pruned positions."""
        return self.size - self.nonzeros

    @property
    def nonzeros(self) -> int:
        """Number of kept positions."""
        return sum(int(torch.count_nonzero(mask)) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Pruned positions as a fraction of all masked positions, in [0, 1]."""
        return self.zeros / self.size if self.size else 0.0

    @property
    def density(self) -> float:
        """Kept positions as a fraction of all masked positions: 1 - sparsity."""
        return 1.0 - self.sparsity

    def __and__(self, other: Masks) -> Masks:
        """Kept in both; a parameter that only one of them masks keeps that mask."""
        return self._join(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        """Kept in either; a parameter that only one of them masks is free, so it drops out."""
        shared = [name for name in self if name in other]
        return Masks({name: self[name] | other[name] for name in shared})

    def _join(self, other: Masks, operation) -> Masks:
        joined = {**self, **other}
        for name in self.keys() & other.keys():
            joined[name] = operation(self[name], other[name])
        return Masks(joined)

    def shuffled(self, seed: int = 0) -> Masks:
        """Random masks that keep equally many weights of every parameter: the control for where the zeros are.

        Example:
            >>> masks = Masks({"weight": torch.tensor([[True, False], [False, False]])})
            >>> masks.shuffled(seed=1).zeros
            3
        """
        generator = torch.Generator().manual_seed(seed)
        places = {name: torch.randperm(mask.numel(), generator=generator) for name, mask in self.items()}
        return Masks(
            {n: mask.reshape(-1)[places[n].to(mask.device)].reshape(mask.shape) for n, mask in self.items()}
        )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Set every pruned weight of `model` to zero (positive zero, so bit patterns agree); returns the model.

        Raises:
            UsageError: a mask has no parameter of its name and shape in the model.
        """
        parameters = named_parameters(unwrapped(model))
        for name, mask in self.items():
            check_fits(name, mask, parameters)
        for name, mask in self.items():
            zero_(local(parameters[name].detach()), shard_like(parameters[name], mask))
        return model

    def save(self, path: str | Path) -> None:
        """Write the masks as safetensors, one bit a weight, names and shapes in the header.

        Cost: size / 8 bytes on disk.
        """
        packed = {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in self.items()
        }
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        save_tensors(path, packed, {"format": FORMAT, "shapes": json.dumps(shapes)})

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what `save` wrote.

        Raises:
            InputError: the file is no mask file, or its header and its bits do not agree.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                header = file.metadata() or {}
                names = list(file.keys())
                packed = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable mask file ({error})") from None
        if header.get("format") != FORMAT:
            raise InputError(f"{path}: not a mask file; expected format {FORMAT}, got {header.get('format')!r}")
        shapes = _read_shapes(path, header.get("shapes", ""), names)
        return cls({name: _unpack(path, name, packed[name], shapes[name]) for name in names})


def _read_shapes(path: str | Path, text: str, names: list[str]) -> dict[str, tuple[int, ...]]:
    try:
        shapes = {str(name): tuple(shape) for name, shape in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{path}: the list of shapes in the header is not readable") from None
    whole = all(isinstance(n, int) and n >= 0 for shape in shapes.values() for n in shape)
    if set(shapes) != set(names) or not whole:
        raise InputError(f"{path}: the shapes in the header do not belong to the masks in the file")
    return shapes


def _unpack(path: str | Path, name: str, packed: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    size = 1
    for n in shape:
        size *= n
    if packed.dtype != np.uint8 or packed.shape != ((size + 7) // 8,):
        raise InputError(
            f"{path}: mask {name} holds {packed.size} bytes of {packed.dtype}, its shape {shape} needs "
            f"{(size + 7) // 8} of uint8"
        )
    bits = np.unpackbits(packed)
    if bits[size:].any():
        raise InputError(f"{path}: mask {name} has bits set behind its last weight; the file was altered")
    return torch.from_numpy(bits[:size].astype(bool).reshape(shape))


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under every name it has: tied tensors appear once for each."""
    return dict(model.named_parameters(remove_duplicate=False))


def check_fits(name: str, mask: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Raise unless the model has a parameter of this name and shape."""
    if name not in parameters:
        raise UsageError(
            f"the model has no parameter {name}; these masks belong to another model; {nearest(name, parameters)}"
        )
    if parameters[name].shape != mask.shape:
        expected, got = tuple(parameters[name].shape), tuple(mask.shape)
        raise UsageError(
            f"mask of {name}: expected shape {expected}, got {got}; these masks belong to another model"
        )
    check_apart(name, parameters[name])


def check_apart(name: str, parameter: Tensor) -> None:
    """Raise where elements of a parameter lie in one place: none of them could be changed alone."""
    strides = zip(parameter.shape, parameter.stride(), strict=True) if parameter.layout == torch.strided else ()
    if any(size > 1 and not stride for size, stride in strides):
        raise UsageError(
            f"{name}: its {parameter.numel():,} elements, shape {tuple(parameter.shape)}, share places in memory "
            f"(strides {tuple(parameter.stride())}, as expand gives), so none can be changed alone; give it memory "
            "of its own: nn.Parameter(weight.detach().clone())"
        )


def zero_(values: Tensor, mask: Tensor) -> None:
    """Write zero where the mask is False, in place; both on one device."""
    # bit patterns times 0 or 1: no negative zero, no NaN times zero, and 15 times faster than masked_fill_
    bits = values.view(INTEGER[values.element_size()])
    if bits.numel() <= CACHED or not (bits.is_contiguous() and mask.is_contiguous()):
        bits.mul_(mask)
        return
    if native.serves(values) and mask.dtype == torch.bool and mask.device == values.device:
        native.zero(values, mask)
        return
    for piece, kept in zip(bits.view(-1).split(CACHED), mask.view(-1).split(CACHED), strict=True):
        piece.mul_(kept)  # torch converts the mask first: in the cache that is five times faster


def undo_(model: nn.Module, masks: Masks) -> nn.Module:
    """Put back the weights from before pruning; returns the model.

    Args:
        masks: what `prune_(..., keep_originals=True)` returned.

    Raises:
        UsageError: the originals were not kept.
    """
    missing = [name for name in masks if name not in masks.originals]
    if missing:
        raise UsageError(
            f"{missing[0]}: its weights from before pruning were not kept; prune with keep_originals=True to be "
            "able to undo"
        )
    parameters = named_parameters(unwrapped(model))
    for name, original in masks.originals.items():
        check_fits(name, original, parameters)
    with torch.no_grad():
        for name, original in masks.originals.items():
            local(parameters[name]).copy_(shard_like(parameters[name], original))
    return model
