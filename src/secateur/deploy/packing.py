"""Small integers as few bytes: two nibbles a byte, and, where many are zero, one bit a weight and the others'
values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.errors import InputError

__all__ = ["pack", "size_packed", "unpack"]


def size_packed(count: int, nonzero: int, bits: int) -> tuple[int, int]:
    """Bytes of all integers, and bytes as a bit for each and the values of the non-zeros alone.

    Example:
        >>> size_packed(1000, 500, 8), size_packed(1000, 500, 4), size_packed(1000, 800, 4)
        ((1000, 625), (500, 375), (500, 525))
    """
    return -(-count * bits // 8), -(-count // 8) + -(-nonzero * bits // 8)


def pack(integers: Tensor, bits: int) -> dict[str, Tensor]:
    """Integers as bytes, in the smaller of two forms.

    Args:
        integers: int8, any shape, in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 4 or 8.

    Returns:
        `values`, uint8; and `kept`, uint8, one bit an integer, first bit first, where zeros are left out.
    """
    flat = integers.detach().cpu().contiguous().reshape(-1).numpy()
    whole, sparse = size_packed(flat.size, int(np.count_nonzero(flat)), bits)
    if whole <= sparse:
        return {"values": torch.from_numpy(_squeezed(flat, bits))}
    kept = flat != 0
    return {
        "values": torch.from_numpy(_squeezed(flat[kept], bits)),
        "kept": torch.from_numpy(np.packbits(kept)),
    }


def unpack(packed: dict[str, Tensor], bits: int, shape: tuple[int, ...], name: str) -> Tensor:
    """What `pack` packed.

    Raises:
        InputError: the bytes are not those of so many integers; names the weight.
    """
    count = int(np.prod(shape, dtype=np.int64))
    values = _bytes(packed["values"], name)
    if "kept" not in packed:
        return torch.from_numpy(_spread(values, bits, count, name).reshape(shape).copy())
    marks = _bytes(packed["kept"], name)
    if marks.size != -(-count // 8):
        raise InputError(f"{name}: {marks.size} bytes of marks, its shape {shape} needs {-(-count // 8)}")
    kept = np.unpackbits(marks)
    if kept[count:].any():
        raise InputError(f"{name}: marks are set behind its last weight; the file was altered")
    kept = kept[:count].astype(bool)
    found = np.zeros(count, dtype=np.int8)
    found[kept] = _spread(values, bits, int(kept.sum()), name)
    return torch.from_numpy(found.reshape(shape))


def _squeezed(flat: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return flat.view(np.uint8).copy()
    low = flat.view(np.uint8) & 15
    low = np.append(low, np.uint8(0)) if low.size % 2 else low
    return low[0::2] | (low[1::2] << 4)


def _spread(values: np.ndarray, bits: int, count: int, name: str) -> np.ndarray:
    expected = -(-count * bits // 8)
    if values.size != expected:
        raise InputError(
            f"{name}: {values.size} bytes of values, {count} integers of {bits} bits need {expected}"
        )
    if bits == 8:
        return values.view(np.int8)
    both = np.empty(2 * values.size, dtype=np.uint8)
    both[0::2], both[1::2] = values & 15, values >> 4
    if both[count:].any():
        raise InputError(f"{name}: a value stands behind its last one; the file was altered")
    return (both[:count].view(np.int8) ^ 8) - 8  # the sign of four bits


def _bytes(tensor: Tensor, name: str) -> np.ndarray:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise InputError(
            f"{name}: packed as {tensor.dim()}-dimensional {tensor.dtype}; expected bytes in a row"
        )
    return tensor.numpy()
