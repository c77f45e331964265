"""A sparse matrix as a stream: one bit for every weight, and the values of those that are not zero.

Bits lie in 64-bit masks, row after row; where fewer than about one weight in nine is kept, an 8-bit index for each of
them takes less. The stream of values is in the order of the bits. Offsets into it are never stored: they follow
from the bits, so a file cannot lie about them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.deploy.grid import to_grid
from secateur.deploy.sparse import kernels, semi
from secateur.errors import UsageError

__all__ = [
    "BLOCKS",
    "FORMS",
    "KINDS",
    "PADDING",
    "SIDE",
    "Block",
    "Packed",
    "pack",
    "pack_integers",
    "reformed",
    "shape_of",
]

FORMS = ("bitmask", "index", "dense", "squares", *semi.PATTERNS)
KINDS = ("float32", "bfloat16", "float16", "int8", "int4")
BLOCKS = (1, 4, 16)  # rows that share an index
SIDE = 4  # rows and columns of a square
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8, "int4": torch.uint8,
}  # fmt: skip
PADDING = 64  # bytes behind the last value that a kernel may read
WORD, SPAN = 64, 256
Block = int | tuple[int, int]  # rows, or rows and columns, that are kept or cut together
CODEBOOK = torch.tensor([*range(8), 0, *range(-7, 0)], dtype=torch.int8)
DENSE_ENOUGH = 0.12  # share of non-zeros below which the index form is smaller
GROUP = 128


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix `(rows, columns)` without its zeros.

    Attributes:
        form: bitmask, index, dense (int8 and int4: nothing left out), squares (int8 only: a bitmask of blocks of 4
            rows by 4 columns), or one of 2:4, 1:4, 8:16, 4:16, 2:16 (so many of every so many columns of a row).
        kind: what a value is.
        block: rows that are kept or cut together.
        rows, columns: of the matrix.
        values: the stream, one-dimensional, and `PADDING` bytes of zeros; block after block, column after column, of a
            square row after row; int4: two in a byte, the lower half first, each block row of a bitmask starting a
            new byte; of N:M and dense int4 as `semi.Lanes` says, zeros where fewer than N are kept.
        mask: int64 `(rows / block, units / 64)`, rounded up, where a unit is a column or, of squares, four; for
            bitmasks and squares.
        negative: the same, marking zeros that have a sign; None where no zero has.
        counts: int16 `(rows / block, columns / 256)`, values in each span; for the index form.
        index: uint8, columns within the span; of N:M `(rows, bytes)`, columns within the M.
        scale: float32 `(rows, groups)`, for integers.
        codebook: int8, 16 values of which the first is 0, for int4.
    """

    form: str
    kind: str
    block: int
    rows: int
    columns: int
    values: Tensor
    mask: Tensor | None = None
    negative: Tensor | None = None
    counts: Tensor | None = None
    index: Tensor | None = None
    scale: Tensor | None = None
    codebook: Tensor | None = None

    @property
    def groups(self) -> int:
        """Block rows."""
        return -(-self.rows // self.block)

    @property
    def across(self) -> int:
        """Columns that are kept or cut together."""
        return SIDE if self.form == "squares" else 1

    @property
    def units(self) -> int:
        """What a block row has bits or indices for."""
        return -(-self.columns // self.across)

    @property
    def lanes(self) -> semi.Lanes | None:
        """Where values lie, of N:M and dense 4-bit codes."""
        return semi.lanes_of(self.form, self.kind, self.columns) if self.in_lanes else None

    @property
    def in_lanes(self) -> bool:
        """Whether values lie in the lanes of vectors, and any batch meets them: N:M and dense 4-bit codes."""
        return self.form in semi.PATTERNS or (self.form == "dense" and self.kind == "int4")

    @cached_property
    def per_group(self) -> Tensor:
        """Units kept in every block row, int64; of N:M as many as there is room for."""
        if self.lanes is not None:
            return torch.full((self.groups,), self.lanes.stored)
        if self.mask is not None:
            return torch.from_numpy(np.bitwise_count(self.mask.numpy().view(np.uint64)).sum(1, dtype=np.int64))
        if self.counts is not None:
            return self.counts.sum(1, dtype=torch.int64)
        return torch.full((self.groups,), self.columns)

    @cached_property
    def offsets(self) -> Tensor:
        """Where every block row starts in the stream, int64, one more than there are."""
        each = self.per_group * self.block * self.across
        if self.kind == "int4" and self.form == "bitmask":
            each = each + each % 2
        return torch.cat([torch.zeros(1, dtype=torch.int64), each.cumsum(0)])

    @property
    def in_integers(self) -> bool:
        """Whether inputs that meet the stream are rounded to integers; this way serves any number of tokens."""
        return self.kind in ("int8", "int4") and self.form != "index"

    @property
    def nonzeros(self) -> int:
        """Values in the stream, those of kept blocks included."""
        return int(self.per_group.sum()) * self.block * self.across

    @property
    def density(self) -> float:
        """Kept blocks as a share of all; of N:M the share that may be kept."""
        if self.lanes is not None:
            return self.lanes.kept / semi.CHUNK
        return int(self.per_group.sum()) / max(1, self.groups * self.units)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        held = (self.values, self.mask, self.negative, self.counts, self.index, self.scale, self.codebook)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by its name here."""
        names = ("values", "mask", "negative", "counts", "index", "scale", "codebook")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        found = replace(self, **moved)
        found.__dict__["offsets"] = self.offsets.to(device)
        return found

    def dense(self) -> Tensor:
        """The matrix: floating-point kinds bit for bit in their own type, integers times their scales in float32."""
        return kernels.scaled(self, kernels.decode(self))


def pack(weight: Tensor, kind: str | None = None, *, form: str | None = None, block: Block = 1) -> Packed:
    """Leave a matrix's zeros out.

    Args:
        weight: `(rows, columns)`, on the CPU.
        kind: None for what the weight is; int8 with a scale for each row, int4 with one for each 128 columns where
            they divide the row. Weights that round to zero are zeros then.
        form: None for the smaller of bitmask and index, or what the block asks for; N:M, as "2:4", for a matrix that
            keeps no more than N of every M weights of a row.
        block: 1, 4 or 16 rows that share an index, or (4, 4) for squares of int8; a block that holds a non-zero is
            stored whole.

    Raises:
        UsageError: a kind, form or block that is not known, no matrix, or one with more weights than its form keeps.
        NumericError: NaN or Inf that should become integers.

    Cost: two passes over the weights.

    Example:
        >>> packed = pack(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, -0.0]]))
        >>> packed.values[: packed.nonzeros].tolist(), packed.mask.tolist(), packed.dense().tolist()
        ([2.0, 3.0], [[2], [1]], [[0.0, 2.0, 0.0], [3.0, 0.0, -0.0]])
    """
    kind = kind or str(weight.dtype).removeprefix("torch.")
    form, rows = _check(weight, kind, form, block)
    if kind in ("int8", "int4"):
        columns = weight.shape[1]
        group = next((g for g in (GROUP, WORD) if columns % g == 0), None) if kind == "int4" else None
        grid = to_grid(weight[None], 4 if kind == "int4" else 8, group)
        return pack_integers(grid.integers[0], grid.scale[0], kind, form=form, block=block)
    return _packed(weight.detach().to(DTYPES[kind]), kind, form, rows)


def pack_integers(
    integers: Tensor, scale: Tensor, kind: str = "int8", *, form: str | None = None, block: Block = 1
) -> Packed:
    """The same of integers that are there already: int8 `(rows, columns)`, scale `(rows, groups)`."""
    form, rows = _check(integers, kind, form, block)
    groups, columns = scale.shape[1], integers.shape[1]
    if form in semi.PATTERNS and not semi.lanes_of(str(form), kind, columns).scales_fit(groups):
        raise UsageError(
            f"form {form}: {groups} scales for {columns} columns do not fall into its vectors of {kind}"
        )
    if groups > 1 and (columns % groups or columns // groups % WORD):
        raise UsageError(
            f"{groups} scales for {columns} columns; each is for the same number of columns, a multiple of {WORD}"
        )
    found = _packed(integers, kind, form, rows)
    codebook = CODEBOOK.clone() if kind == "int4" else None
    return replace(found, scale=scale.float().contiguous(), codebook=codebook)


def reformed(packed: Packed, form: str | None) -> Packed:
    """The same matrix as a bitmask, with indices, as N:M, or (None) as the smaller of the first two.

    As it is where its integers have a codebook of their own.

    Raises:
        UsageError: it has more weights than N:M keeps.
    """
    if form == packed.form or (packed.codebook is not None and not torch.equal(packed.codebook, CODEBOOK)):
        return packed
    weight = kernels.decode(packed)
    if packed.scale is None:
        return _packed(weight, packed.kind, form, packed.block)
    return pack_integers(weight, packed.scale, packed.kind, form=form, block=packed.block)


def shape_of(block: Block) -> tuple[int, int]:
    """Rows and columns of a block.

    Raises:
        UsageError: none of those there are kernels for.

    Example:
        >>> shape_of(16), shape_of((4, 4))
        ((16, 1), (4, 4))
    """
    shape = (block, 1) if isinstance(block, int) else block
    if shape not in [(SIDE, SIDE), *((rows, 1) for rows in BLOCKS)]:
        raise UsageError(
            f"block is {block!r}; expected {', '.join(map(str, BLOCKS))} rows, or ({SIDE}, {SIDE})"
        )
    return shape


def _check(weight: Tensor, kind: str, form: str | None, block: Block) -> tuple[str | None, int]:
    """The form, which (4, 4) says, and the rows of a block."""
    rows, across = shape_of(block)
    if kind not in KINDS or (form is not None and form not in FORMS):
        raise UsageError(
            f"kind={kind!r}, form={form!r}; expected one of {', '.join(KINDS)}; {', '.join(FORMS)}"
        )
    if across > 1 and form is None:
        form = "squares"
    if (across > 1 or form == "squares") and (form != "squares" or kind != "int8"):
        raise UsageError(
            f"kind={kind!r}, form={form!r}: squares of {SIDE} x {SIDE} are a form of int8; other kinds take the same "
            f"weights with block={SIDE}"
        )
    if form == "squares":
        rows = SIDE
    if weight.dim() != 2 or weight.device.type != "cpu" or 0 in weight.shape:
        raise UsageError(f"a matrix on the CPU is expected, got {tuple(weight.shape)} on {weight.device}")
    if form == "dense" and kind not in ("int8", "int4"):
        raise UsageError(f"form dense is for int8 and int4 alone, not {kind}")
    if form in ("dense", "index", *semi.PATTERNS) and rows > 1:
        raise UsageError(f"form {form} is for single weights alone")
    return form, rows


def _packed(weight: Tensor, kind: str, form: str | None, block: int) -> Packed:
    weight = weight.contiguous()
    rows, columns = weight.shape
    start = {"kind": kind, "block": block, "rows": rows, "columns": columns}
    if form == "dense" and kind == "int4":
        values = semi.codes_of(semi.pad_rows(weight, semi.lanes_of(form, kind, columns)))
        return Packed("dense", values=padded(values.flatten()), **start)  # type: ignore[arg-type]
    if form == "dense":
        return Packed("dense", values=padded(weight.reshape(-1)), **start)  # type: ignore[arg-type]
    if form in semi.PATTERNS:
        return _semi(weight, kind, str(form))
    found = kernels.encode(weight, block, SIDE if form == "squares" else 1)
    if form is None:
        form = "index" if block == 1 and found.size < DENSE_ENOUGH * rows * columns else "bitmask"
    values = found.values
    if kind == "int4":
        values = _nibbles(values, found.per_group * block, whole=form == "bitmask")
    if form in ("bitmask", "squares"):
        return Packed(form, values=padded(values), mask=found.mask, negative=found.negative, **start)  # type: ignore[arg-type]
    counts, index = kernels.spans(found.mask, columns, found.per_group)
    return Packed(
        "index",
        values=padded(values),
        counts=counts,
        index=index,
        negative=found.negative,
        **start,  # type: ignore[arg-type]
    )


def _semi(weight: Tensor, kind: str, form: str) -> Packed:
    """As N:M."""
    rows, columns = weight.shape
    lanes = semi.lanes_of(form, kind, columns)
    found = semi.pack_rows(weight, lanes)
    if found is None:
        raise UsageError(f"form {form}: some {lanes.wide} columns of a row keep more than {lanes.each} weights")
    values, index = found
    if kind == "int4":
        values = semi.codes_of(values)
    negative = kernels.signs(weight) if weight.is_floating_point() else None
    return Packed(form, kind, 1, rows, columns, padded(values.flatten()), negative=negative, index=index)


def padded(values: Tensor) -> Tensor:
    """A stream with zeros behind it."""
    return torch.cat([values, values.new_zeros(PADDING // values.element_size())])


def _nibbles(values: Tensor, each: Tensor, *, whole: bool) -> Tensor:
    """Integers in [-7, 7] as two codes a byte; with `whole` every block row from a whole byte on."""
    size = each + each % 2 if whole else each
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)])
    return kernels.codes(values, each.contiguous(), starts)
