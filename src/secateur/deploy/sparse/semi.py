"""N of every M weights of a row: the form whose indices fill whole vectors, so that nothing has to be expanded.

Where as many weights of every 4 or 16 columns are kept as of every other, a kernel knows where each value belongs
without counting those before it: an index of 2 or 4 bits beside each value picks its input by one shuffle. Which
columns a place of the stream may come from is fixed by the shuffles; `Lanes` says it for Python, `unit_of` in
native/sparse.h for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.core import native

__all__ = [
    "PATTERNS",
    "Lanes",
    "codes_of",
    "fits",
    "fitting",
    "integers_of",
    "lanes_of",
    "pack_rows",
    "pad_rows",
    "unpack_rows",
]

PATTERNS = {
    "2:4": (8, 2),
    "1:4": (4, 2),
    "8:16": (8, 4),
    "4:16": (4, 4),
    "2:16": (2, 4),
}  # of 16; bits of an index
CHUNK, VECTOR = 16, 32  # columns that are counted, bytes of a vector
CODES = 1 << 22  # that are looked up at a time
DENSE = (CHUNK, 4)  # codes of 4 bits with nothing left out, the case without indices


@dataclass(frozen=True)
class Lanes:
    """Where the values of a row lie.

    Attributes:
        kept: of every 16 columns.
        bits: of an index: 2 in a unit of 4 columns, 4 in one of 16.
        lanes: of a vector: 32 for bytes and 4-bit codes, 8 for floating point.
        columns: of the matrix.
        codes: whether two vectors of 4-bit codes lie in one of bytes.
    """

    kept: int
    bits: int
    lanes: int
    columns: int
    codes: bool

    @property
    def wide(self) -> int:
        """Columns of a unit."""
        return 1 << self.bits

    @property
    def each(self) -> int:
        """Values of a unit."""
        return self.kept * self.wide // CHUNK

    @property
    def met(self) -> int:
        """Vectors that meet columns."""
        return -(-self.columns // self.reach)

    @property
    def vectors(self) -> int:
        """Of a row: of codes an even number."""
        return self.met + self.met % 2 if self.codes else self.met

    @property
    def reach(self) -> int:
        """Columns of a vector."""
        return CHUNK * self.lanes // self.kept

    @property
    def stored(self) -> int:
        """Values of a row."""
        return self.vectors * self.lanes

    @property
    def filled(self) -> int:
        """Vectors whose indices lie side by side in 32 bytes."""
        return 8 * VECTOR // self.lanes // self.bits

    @property
    def bytes(self) -> int:
        """Of a row's indices."""
        return -(-self.met // self.filled) * VECTOR

    @property
    def whole(self) -> bool:
        """Whether nothing is left out, and there are no indices."""
        return self.kept == CHUNK

    @cached_property
    def first(self) -> Tensor:
        """The first column of the unit that each value of a row belongs to, int64 `(stored)`."""
        vector, lane = np.divmod(np.arange(self.stored), self.lanes)
        start = vector * self.reach
        if self.lanes < VECTOR and self.bits != 2:
            return torch.from_numpy(start + lane // self.each * self.wide)
        half, in_half = np.divmod(lane, self.lanes // 2)
        chunk = CHUNK if self.lanes == VECTOR else 4
        whole = self.each * chunk // self.wide  # values of a chunk
        chunks = 2 * (in_half // whole) + half
        return torch.from_numpy(start + chunks * chunk + in_half % whole // self.each * self.wide)

    @cached_property
    def places(self) -> Tensor:
        """Where the values of each unit lie in a row, unit after unit, int32."""
        return self.first.argsort(stable=True).to(torch.int32)

    def scales_fit(self, groups: int) -> bool:
        """Whether a vector lies within a scale, or holds 2 or 4 whole ones; bytes have one scale a row."""
        width = self.columns // groups
        whole = width % self.reach == 0 or self.reach in (2 * width, 4 * width)
        return groups == 1 or (self.codes and self.columns % self.reach == 0 and whole)

    def numbers(self, rows: int, size: int, signed: bool) -> np.ndarray:
        """As native/semi.cpp takes them."""
        of_row = (
            self.columns,
            self.stored,
            self.wide,
            self.each,
            self.lanes,
            self.filled,
            self.bits,
            self.bytes,
        )
        return np.array([rows, *of_row, size, signed, torch.get_num_threads()], dtype=np.int64)


@lru_cache(maxsize=64)
def lanes_of(form: str, kind: str, columns: int) -> Lanes:
    """Where values lie in a form of `PATTERNS`, or where nothing is left out."""
    kept, bits = PATTERNS.get(form, DENSE)
    return Lanes(kept, bits, VECTOR if kind in ("int8", "int4") else VECTOR // 4, columns, kind == "int4")


def fits(mask: Tensor, form: str) -> bool:
    """Whether a bitmask of single weights, 64 columns a word, keeps no more than the form does.

    Example:
        >>> mask = torch.tensor([[0b1001_0110], [0b0011_0001]])
        >>> fits(mask, "2:4"), fits(mask, "1:4"), fits(mask, "4:16")
        (True, False, True)
    """
    kept, bits = PATTERNS[form]
    words = mask.contiguous().numpy()
    if bits == 4:
        return int(np.bitwise_count(words.view(np.uint16)).max(initial=0)) <= kept
    halves = words.view(np.uint8)
    most = max(int(np.bitwise_count(part).max(initial=0)) for part in (halves & 15, halves >> 4))
    return most <= kept // 4


def fitting(mask: Tensor) -> tuple[str, ...]:
    """The forms that a bitmask fits; in every kind an earlier one takes less."""
    return tuple(form for form in ("2:16", "1:4", "4:16", "2:4", "8:16") if fits(mask, form))


def pack_rows(weight: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor] | None:
    """Values `(rows, stored)` and indices, uint8 `(rows, bytes)`; None where the matrix does not fit."""
    rows = len(weight)
    library = native.library()
    if library is None:
        return _pack_in_torch(weight, lanes)
    values = weight.new_zeros(rows, lanes.stored)
    index = torch.zeros(rows, lanes.bytes, dtype=torch.uint8)
    numbers = lanes.numbers(rows, weight.element_size(), weight.is_floating_point())
    wrong = library.secateur_semi_pack(
        weight.data_ptr(), lanes.places.data_ptr(), values.data_ptr(), index.data_ptr(), numbers.ctypes.data
    )
    return None if wrong else (values, index)


def pad_rows(weight: Tensor, lanes: Lanes) -> Tensor:
    """Values `(rows, stored)` of a matrix of which nothing is left out."""
    return F.pad(weight, (0, lanes.stored - lanes.columns))


def unpack_rows(values: Tensor, index: Tensor, lanes: Lanes) -> Tensor:
    """The matrix again, zeros without a sign; on any device."""
    library = native.library() if values.is_cpu else None
    if library is None:
        return _unpack_in_torch(values, index, lanes)
    dense = values.new_empty(len(values), lanes.columns)
    numbers = lanes.numbers(len(values), values.element_size(), False)
    values, index = values.contiguous(), index.contiguous()
    library.secateur_semi_rows(
        dense.data_ptr(), lanes.places.data_ptr(), values.data_ptr(), index.data_ptr(), numbers.ctypes.data
    )
    return dense


def codes_of(integers: Tensor) -> Tensor:
    """Integers in [-7, 7], `(rows, stored)`, as bytes of two vectors' codes each."""
    pairs = integers.contiguous().view(torch.uint8).unflatten(1, (integers.shape[1] // (2 * VECTOR), 2, VECTOR))
    return ((pairs[:, :, 0] & 15) | (pairs[:, :, 1] << 4)).flatten(1)


def integers_of(codes: Tensor, codebook: Tensor) -> Tensor:
    """The integers of `codes_of`."""
    found = []
    for part in codes.split(max(1, CODES // max(1, codes.shape[1]))):  # an index takes 4 bytes
        pairs = part.unflatten(1, (part.shape[1] // VECTOR, 1, VECTOR))
        found.append(codebook[torch.cat([pairs & 15, pairs >> 4], 2).int()].flatten(1))
    return torch.cat(found)


def chosen(index: Tensor, lanes: Lanes) -> Tensor:
    """The index beside each value, int64 `(rows, stored)`; what is behind the last vector that meets columns is 0."""
    parts = index.unflatten(1, (index.shape[1] // VECTOR, lanes.lanes, VECTOR // lanes.lanes))
    shifts = torch.arange(0, 8, lanes.bits, device=index.device, dtype=torch.uint8)
    found = (parts[..., None] >> shifts) & (
        lanes.wide - 1
    )  # rows, blocks, lanes, bytes of a lane, indices of a byte
    found = found.flatten(3).transpose(2, 3).flatten(1)
    found = F.pad(found, (0, max(0, lanes.stored - found.shape[1])))
    return found[:, : lanes.stored].long()


def _pack_in_torch(weight: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor] | None:
    rows, units = len(weight), lanes.stored // lanes.each
    wide = weight.new_zeros(rows, units * lanes.wide)
    wide[:, : lanes.columns] = weight
    tiles = wide.view(rows, units, lanes.wide)
    kept = tiles != 0
    if int(kept.sum(2).max()) > lanes.each:
        return None
    row, unit, column = kept.nonzero(as_tuple=True)
    rank = (kept.cumsum(2) - 1)[row, unit, column]
    place = lanes.places.long()[unit * lanes.each + rank]
    values = weight.new_zeros(rows, lanes.stored)
    values[row, place] = tiles[row, unit, column]
    index = torch.zeros(rows, lanes.bytes, dtype=torch.int64)
    vector, lane = place // lanes.lanes, place % lanes.lanes
    bit = vector % lanes.filled * lanes.bits
    at = vector // lanes.filled * VECTOR + lane * (VECTOR // lanes.lanes) + bit // 8
    index.index_put_((row, at), column << (bit % 8), accumulate=True)
    return values, index.to(torch.uint8)


def _unpack_in_torch(values: Tensor, index: Tensor, lanes: Lanes) -> Tensor:
    columns = lanes.first.to(values.device) + chosen(index, lanes)
    wide = values.new_zeros(len(values), lanes.vectors * lanes.reach)
    row, place = (values != 0).nonzero(as_tuple=True)
    wide[row, columns[row, place]] = values[row, place]
    return wide[:, : lanes.columns].contiguous()
