"""`torch.ops.secateur.sparse_linear`: sparse layers as one operator that compile and export take whole.

The operator takes tensors and numbers alone, so a program that holds it can be stored. For inference: it has no
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.core import native
from secateur.deploy.sparse import kernels
from secateur.deploy.sparse.packed import FORMS, KINDS, Packed

__all__ = [
    "BATCHES",
    "DENSE",
    "STREAM",
    "TILES",
    "UNPACK",
    "bucket",
    "product_of",
    "sparse_linear",
    "streams",
    "usual_ways",
]

STREAM, TILES, UNPACK = 0, 1, 2  # straight from the stream; tokens in lanes; rows unpacked for torch
DENSE = 3  # a layer's way alone: torch's product with a dense weight that it keeps beside
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # a way is chosen for each up to these, and one beyond
FEW = 4
INTEGER_COLUMNS = 1 << 17  # whose products a 32-bit sum holds
PANEL = 1 << 22  # weights that are unpacked at a time

_library = torch.library.Library("secateur", "DEF")
_library.define(
    "sparse_linear(Tensor x, Tensor values, Tensor offsets, Tensor? mask, Tensor? counts, Tensor? index, "
    "Tensor? scale, Tensor? codebook, Tensor? bias, int rows, int columns, int form, int kind, "
    "int block, int[] ways) -> Tensor"
)


def bucket(batch: int) -> int:
    """Which of `BATCHES` a batch belongs to; their number for a larger one.

    Example:
        >>> [bucket(n) for n in (1, 3, 128, 129)]
        [0, 2, 7, 8]
    """
    place = 0
    for most in BATCHES:  # no bisect: dynamo traces this
        place += batch > most
    return place


def _sparse_linear(
    x: Tensor, values: Tensor, offsets: Tensor, mask: Tensor | None, counts: Tensor | None, index: Tensor | None,
    scale: Tensor | None, codebook: Tensor | None, bias: Tensor | None, rows: int, columns: int, form: int, kind: int,
    block: int, ways: Sequence[int],
) -> Tensor:  # fmt: skip
    packed = Packed(
        FORMS[form], KINDS[kind], block, rows, columns, values, mask, None, counts, index, scale, codebook
    )
    packed.__dict__["offsets"] = offsets
    return product_of(packed, x, bias, ways, None)


def product_of(
    packed: Packed, x: Tensor, bias: Tensor | None, ways: Sequence[int], product: kernels.Product | None
) -> Tensor:
    """The operator itself; `product` is one of this matrix that was made before."""
    rows, columns = packed.rows, packed.columns
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    batch = flat.shape[0]
    if flat.shape[1] != columns:
        raise RuntimeError(f"inputs of {flat.shape[1]} columns meet a matrix of {columns}")
    if x.device.type != "cpu":
        from secateur.deploy.sparse import gpu

        return gpu.multiply(packed, flat, bias).view(*x.shape[:-1], rows)
    way = min(ways[bucket(batch)], UNPACK)
    if way != UNPACK and batch and native.library() is not None:
        if way == STREAM and not streams(packed, batch):
            way = TILES
        wide = flat if flat.dtype == torch.float32 else flat.float()
        y = (product or kernels.Product(packed, bias))(wide.contiguous(), way)
        if y is not None:
            return (y if x.dtype == torch.float32 else y.to(x.dtype)).view(*x.shape[:-1], rows)
    return _unpacked(packed, flat, bias).view(*x.shape[:-1], rows)


def _unpacked(packed: Packed, flat: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of the matrix made dense, a panel at a time, and torch's own product."""
    step = max(1, PANEL // packed.columns)
    panels = [
        F.linear(
            flat,
            kernels.scaled(packed, kernels.decode(packed, first, min(packed.rows, first + step)), first).to(
                flat.dtype
            ),
        )
        for first in range(0, packed.rows, step)
    ]
    y = panels[0] if len(panels) == 1 else torch.cat(panels, -1)
    return y if bias is None else y + bias.to(y.dtype)


def streams(packed: Packed, batch: int) -> bool:
    """Whether a batch can be multiplied straight from the stream."""
    return (batch <= FEW or packed.in_integers) and packed.columns <= INTEGER_COLUMNS


@torch.library.register_fake("secateur::sparse_linear", lib=_library)
def _fake(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[7])


_library.impl("sparse_linear", _sparse_linear, "CPU")
_library.impl("sparse_linear", _sparse_linear, "CUDA")


def sparse_linear(
    packed: Packed, x: Tensor, bias: Tensor | None = None, *, ways: Sequence[int] | None = None
) -> Tensor:
    """`x w^T + bias` of a packed matrix.

    Args:
        packed: the matrix `(rows, columns)`.
        x: `(..., columns)`, any floating-point type. Sums are float32, the result has the type of x. Where the
            stream of integers is met (not in the index form), inputs are rounded to 8 bits, token by token.
            NaN and Inf reach every row, as in a dense product.
        bias: `(rows)`.
        ways: how, for each of `BATCHES` and beyond; None for the usual choice.

    Example:
        >>> from secateur.deploy.sparse.packed import pack
        >>> sparse_linear(pack(torch.tensor([[0.0, 2.0], [3.0, 0.0]])), torch.tensor([1.0, 10.0]))
        tensor([20.,  3.])
    """
    return torch.ops.secateur.sparse_linear(
        x, packed.values, packed.offsets, packed.mask, packed.counts, packed.index, packed.scale, packed.codebook, bias,
        packed.rows, packed.columns, FORMS.index(packed.form), KINDS.index(packed.kind), packed.block,
        list(usual_ways(packed) if ways is None else ways),
    )  # fmt: skip


def usual_ways(packed: Packed) -> tuple[int, ...]:
    """The stream where it serves the batch, tiles where not."""
    return tuple(STREAM if streams(packed, most) else TILES for most in (*BATCHES, 2 * BATCHES[-1]))
