"""`torch.ops.secateur.sparse_linear`: sparse layers as one operator that compile and export take whole.

The operator takes tensors and numbers alone, so a program that holds it can be stored. For inference: it has no
gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from operator import is_
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
    "Ready",
    "bucket",
    "by_torch",
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


Parts = tuple[Tensor | None, ...]  # offsets, mask, counts, index, scale, codebook


class Ready:
    """A matrix made ready: all that a product needs and that does not depend on its inputs, looked up once.

    Several threads may call at once. Values are held weakly: what is kept by them does not keep them.

    Args:
        packed: on the CPU, where the native kernels are.
        bias: `(rows)`, or None.
        ways: as of `sparse_linear`; None for the usual ones.

    Raises:
        RuntimeError: it is elsewhere than on the CPU, where the inputs are.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, ways: Sequence[int] | None):
        if not packed.values.is_cpu or not (bias is None or bias.is_cpu):
            raise RuntimeError(
                f"inputs on the CPU meet a matrix on {packed.values.device}; move one to the other"
            )
        self.library, self.bias, self.ways = native.library(), bias, ways
        self._values = weakref.ref(packed.values, partial(_forget, id(packed.values)))
        self._others = (packed.offsets, packed.mask, packed.counts, packed.index, packed.scale, packed.codebook)
        self._places = _places(packed.values, bias, self._others)
        form, kind = FORMS.index(packed.form), KINDS.index(packed.kind)
        self.numbers = (packed.rows, packed.columns, form, kind, packed.block)
        self._product = kernels.Product(packed, bias)
        chosen = usual_ways(packed) if ways is None else ways
        self._ways = tuple(_way(packed, chosen, batch) for batch in range(BATCHES[-1] + 2))

    def serves(self, values: Tensor, bias: Tensor | None, others: Parts) -> bool:
        """Whether it was made of these and they are where they were; what else changes in place is seen."""
        return (
            self._values() is values
            and self.bias is bias
            and all(map(is_, self._others, others))
            and _places(values, bias, others) == self._places
            and self.library is native.library()
        )

    def __call__(self, x: Tensor) -> Tensor | None:
        """The product with an x on the CPU; None where it is torch's to multiply, or to say what is wrong."""
        shape, columns = x.shape, self._product.columns
        if not shape or shape[-1] != columns:
            return None
        way = self._ways[min(x.numel() // columns, BATCHES[-1] + 1)]
        if way == UNPACK:
            return None
        if x.dtype == torch.float32:
            return self._product(x if x.is_contiguous() else x.contiguous(), way)
        y = self._product(x.float().contiguous(), way)
        return None if y is None else y.to(x.dtype)


def _places(values: Tensor, bias: Tensor | None, others: Parts) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in (values, bias, *others))


# By the identity of the values, while they live, and of the bias: tied layers may have one each
_ready: dict[int, dict[int, Ready]] = {}
BIASES = 4  # that are remembered for each matrix


def _forget(identity: int, _: object) -> None:
    _ready.pop(identity, None)


def _way(packed: Packed, ways: Sequence[int], batch: int) -> int:
    """The way of a batch; what has no stream for it is in tiles, or unpacked."""
    way = min(ways[bucket(batch)], UNPACK) if batch else UNPACK
    if way == UNPACK or (way == STREAM and streams(packed, batch)):
        return way
    return UNPACK if packed.form == "squares" or (packed.in_lanes and packed.in_integers) else TILES


def _sparse_linear(
    x: Tensor, values: Tensor, offsets: Tensor, mask: Tensor | None, counts: Tensor | None, index: Tensor | None,
    scale: Tensor | None, codebook: Tensor | None, bias: Tensor | None, rows: int, columns: int, form: int, kind: int,
    block: int, ways: Sequence[int],
) -> Tensor:  # fmt: skip
    others, numbers = (offsets, mask, counts, index, scale, codebook), (rows, columns, form, kind, block)
    here, packed = x.is_cpu and native.library() is not None, None
    known = _ready.get(id(values), {}) if here else {}
    found = known.get(id(bias))
    same = found is not None and found.serves(values, bias, others)
    if here and not (same and found.numbers == numbers and found.ways == ways):  # type: ignore[union-attr]
        packed = _put_together(values, others, numbers)
        for old in list(known)[: max(0, len(known) - BIASES + 1)]:
            known.pop(old, None)
        found = known[id(bias)] = Ready(packed, bias, ways)
        _ready[id(values)] = known
    y = None if found is None else found(x)
    return by_torch(packed or _put_together(values, others, numbers), x, bias) if y is None else y


def _put_together(
    values: Tensor, others: tuple[Tensor | None, ...], numbers: tuple[int, int, int, int, int]
) -> Packed:
    rows, columns, form, kind, block = numbers
    offsets, mask, counts, index, scale, codebook = others
    packed = Packed(
        FORMS[form], KINDS[kind], block, rows, columns, values, mask, None, counts, index, scale, codebook
    )
    packed.__dict__["offsets"] = offsets
    return packed


def by_torch(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """The operator without the native kernels: by those of a GPU, or by torch with rows made dense.

    Raises:
        RuntimeError: x has another number of columns.
    """
    rows, columns = packed.rows, packed.columns
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    if flat.shape[1] != columns:
        raise RuntimeError(f"inputs of {flat.shape[1]} columns meet a matrix of {columns}")
    if x.device.type != "cpu":
        from secateur.deploy.sparse import gpu

        return gpu.multiply(packed, flat, bias).view(*x.shape[:-1], rows)
    step = max(1, PANEL // columns)
    panels = [
        F.linear(
            flat,
            kernels.scaled(packed, kernels.decode(packed, first, min(rows, first + step)), first).to(
                flat.dtype
            ),
        )
        for first in range(0, rows, step)
    ]
    y = panels[0] if len(panels) == 1 else torch.cat(panels, -1)
    return (y if bias is None else y + bias.to(y.dtype)).view(*x.shape[:-1], rows)


def streams(packed: Packed, batch: int) -> bool:
    """Whether a batch can be multiplied straight from the stream."""
    if batch > FEW and not packed.in_integers and not packed.in_lanes:
        return _meets_tiles(packed)
    return packed.columns <= INTEGER_COLUMNS


def _meets_tiles(packed: Packed) -> bool:
    """Whether tile registers take any batch in bfloat16; of inputs that are none the kernels make tokens in lanes."""
    bits = packed.kind == "bfloat16" and packed.form == "bitmask"
    return bits and kernels.LEVELS[kernels.level()] == "amx"


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
    """The stream where it may serve the batch, tiles where not.

    What the machine has is not asked, since compilers trace this: where tile registers are missing the operator takes
    tiles of tokens instead.
    """
    bits = packed.kind == "bfloat16" and packed.form == "bitmask"
    return tuple(STREAM if bits or streams(packed, most) else TILES for most in (*BATCHES, 2 * BATCHES[-1]))
