"""The native kernels, where they were built: exact selection, column elimination, rounding, sparse matrices on a CPU.

The library is plain C behind ctypes (`native/` in the repository). It is compiled when secateur is installed, where
a C++ compiler is at hand; without it, or with `SECATEUR_NATIVE=0` in the environment, the callers take their torch
path, which gives the same answers.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = ["between", "eliminate", "grid", "library", "path", "serves", "smallest", "zero"]

ABI = 11
ROOM = 1 << 22  # scores collected at most
MOST = 1 << 13  # of 65,536: where there are more (ties, mostly) they are only counted
FILE = Path(__file__).with_name("kernels.native.so")

_SIZE, _THREADS, _FLAG = ctypes.c_int64, ctypes.c_int32, ctypes.c_int32
_POINTER, _VALUE = ctypes.c_void_p, ctypes.c_float
_ARGUMENTS = {
    "secateur_eliminate": [*[_POINTER] * 3, _SIZE, *[_POINTER] * 2, _SIZE, _SIZE, _THREADS],
    "secateur_between": [
        _POINTER, _SIZE, _FLAG, _VALUE, _VALUE, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _THREADS
    ],
    "secateur_smallest": [_POINTER, _SIZE, _SIZE, _FLAG, _POINTER, _VALUE, _FLAG, _POINTER, _THREADS],
    "secateur_zero": [_POINTER, _SIZE, _POINTER, _THREADS],
    "secateur_sparse_level": [],
    "secateur_sparse_count": [_POINTER, _SIZE, _SIZE, _FLAG, _FLAG, _POINTER],
    "secateur_sparse_encode": [
        _POINTER, _SIZE, _SIZE, _FLAG, _FLAG, _POINTER, _POINTER, _POINTER, _POINTER, _THREADS
    ],
    "secateur_sparse_decode": [
        _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLAG, _POINTER, _THREADS
    ],
    "secateur_sparse_spans": [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _THREADS],
    "secateur_sparse_bits": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _THREADS],
    "secateur_sparse_block_bits": [
        _POINTER, *[_SIZE] * 4, _FLAG, _FLAG, _POINTER, _POINTER, _POINTER, _THREADS
    ],
    "secateur_sparse_block_values": [
        _POINTER, *[_SIZE] * 4, _FLAG, _POINTER, _POINTER, _POINTER, _THREADS
    ],
    "secateur_sparse_block_rows": [*[_POINTER] * 5, *[_SIZE] * 4, _FLAG, _POINTER, _THREADS],
    "secateur_sparse_codes": [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER],
    "secateur_sparse_multiply": [_POINTER, _POINTER],
    "secateur_semi_pack": [_POINTER] * 5,
    "secateur_semi_rows": [_POINTER] * 5,
    "secateur_grid": [_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _VALUE, _POINTER, _POINTER, _THREADS],
}  # fmt: skip


@cache
def _opened() -> tuple[ctypes.CDLL | None, str]:
    """The library, and which path is active in words."""
    if os.environ.get("SECATEUR_NATIVE") == "0":
        return None, "torch (SECATEUR_NATIVE=0)"
    if not FILE.is_file():
        return (
            None,
            "torch (the native kernels were not built; a C++ compiler and a new installation build them)",
        )
    try:
        library = ctypes.CDLL(str(FILE))
        version = library.secateur_abi()
    except (OSError, AttributeError) as error:
        return None, f"torch (the native kernels do not load: {error})"
    if version != ABI:
        return None, f"torch (the native kernels are of version {version}, expected {ABI}; install again)"
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = ctypes.c_int64
    return library, "native kernels"


def path() -> str:
    """Which path is active, for `secateur doctor`."""
    return _opened()[1]


def serves(scores: Tensor) -> bool:
    """Whether the kernels are there and can read this tensor: float32, on the CPU."""
    return scores.dtype == torch.float32 and scores.device.type == "cpu" and _opened()[0] is not None


def between(
    scores: Float[Tensor, " *score"], a: float, b: float, *, absolute: bool = False
) -> tuple[int, int, Float[Tensor, " inside"] | None]:
    """How many scores are below a, how many in [a, b], and those themselves, or None where they are too many.

    Args:
        scores: with `absolute`, weights whose magnitudes are the scores.
        a, b: bounds, a <= b.
    """
    flat = scores.contiguous()
    inside = torch.empty(min(flat.numel(), ROOM))
    below, collected = ctypes.c_int64(), ctypes.c_int64()
    count = _library().secateur_between(
        flat.data_ptr(), flat.numel(), absolute, a, b, inside.data_ptr(), len(inside), MOST, ctypes.byref(below),
        ctypes.byref(collected), torch.get_num_threads(),
    )  # fmt: skip
    return below.value, count, inside[:count].clone() if collected.value == count else None


def smallest(
    scores: Float[Tensor, "row unit"],
    counts: Int[Tensor, " row"],
    *,
    absolute: bool = False,
    guess: float | None = None,
    others: bool = False,
) -> Bool[Tensor, "row unit"]:
    """Mark the `counts[r]` smallest scores of every row r, ties by index; see `core.select.smallest`."""
    scores, counts = scores.contiguous(), counts.to(torch.int64).contiguous()
    marked = torch.empty(scores.shape, dtype=torch.bool)
    _library().secateur_smallest(
        scores.data_ptr(),
        *scores.shape,
        absolute,
        counts.data_ptr(),
        float("nan") if guess is None else guess,
        others,
        marked.data_ptr(),
        torch.get_num_threads(),
    )
    return marked


def zero(words: Shaped[Tensor, "*shape"], kept: Bool[Tensor, "*shape"]) -> None:
    """Write zero where nothing is kept: elements of four bytes, both contiguous and on the CPU."""
    _library().secateur_zero(words.data_ptr(), words.numel(), kept.data_ptr(), torch.get_num_threads())


def eliminate(
    target: Float[Tensor, "column out"],
    keep: Float[Tensor, "column out"],
    factor: Float[Tensor, "column column"],
    gained: Float[Tensor, "column out"],
    lost: Float[Tensor, "column out"],
) -> None:
    """Eliminate a block of columns, changing `gained` and writing `lost`; see `recover.update.SparseGPT`.

    All but the factor are contiguous.
    """
    factor = factor.contiguous()
    _library().secateur_eliminate(
        target.data_ptr(), keep.data_ptr(), factor.data_ptr(), factor.stride(0), gained.data_ptr(), lost.data_ptr(),
        *target.shape, torch.get_num_threads(),
    )  # fmt: skip


def library() -> ctypes.CDLL | None:
    """The library itself; None where it was not built, does not load, or is not wanted."""
    return _opened()[0]


def _library() -> ctypes.CDLL:
    found = _opened()[0]
    assert found is not None  # callers ask `serves` first
    return found


def grid(
    rows: Float[Tensor, "group width"], tried: Float[Tensor, "group count"], largest: float
) -> tuple[Int[Tensor, "group width"], Float[Tensor, " group"]]:
    """Integers of each group, and of the scales tried for it the one that errs least, the first of equals."""
    rows, tried = rows.contiguous(), tried.contiguous()
    integers, scale = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows))
    _library().secateur_grid(
        rows.data_ptr(), *rows.shape, tried.data_ptr(), tried.shape[1], largest, scale.data_ptr(), integers.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return integers, scale
