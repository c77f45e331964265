"""Encoding, decoding and multiplying, by the native kernels where they are and in torch and numpy where not."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.core import native
from secateur.deploy.sparse import semi
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.deploy.sparse.packed import Packed

__all__ = [
    "Encoded",
    "Product",
    "bits_of",
    "codes",
    "decode",
    "encode",
    "level",
    "mask_of",
    "scaled",
    "signs",
    "spans",
]

FORM = {form: n for n, form in enumerate(("bitmask", "index", "dense", "squares", *semi.PATTERNS))}
KIND = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
ENVIRONMENT = "SECATEUR_ISA"
LEVELS = ("plain", "avx2", "avx512", "amx")
SHORT = 3  # what a kernel says where memory is short
ALONE = 1 << 18  # weights below which one thread is faster than waking another
_POINTERS, _NUMBERS = struct.Struct("10P"), struct.Struct("10q")  # what the kernels are called with


class Encoded(NamedTuple):
    """Bits, stream and counts of a matrix; see `Packed`."""

    mask: Tensor
    negative: Tensor | None
    values: Tensor
    per_group: Tensor
    size: int


def level() -> int:
    """The instruction set in use, a place in `LEVELS`; `SECATEUR_ISA` takes a lesser one than the best.

    Raises:
        UsageError: `SECATEUR_ISA` names none, or one that this machine or library lacks.
    """
    library = native.library()
    best = int(library.secateur_sparse_level()) if library is not None else 0
    wanted = os.environ.get(ENVIRONMENT, "")
    if not wanted:
        return best
    if wanted not in LEVELS or LEVELS.index(wanted) > best:
        raise UsageError(f"{ENVIRONMENT}={wanted}: this machine has {', '.join(LEVELS[: best + 1])}")
    return LEVELS.index(wanted)


def encode(weight: Tensor, block: int = 1, across: int = 1) -> Encoded:
    """The bits of a contiguous matrix and its non-zeros: blocks of so many rows and columns, each row after row."""
    rows, columns = weight.shape
    library = native.library()
    if library is None:
        return _encode_in_numpy(weight, block, across)
    if block > 1:
        return _encode_blocks(weight, block, across)
    words, bytes_, signed = -(-columns // 64), weight.element_size(), weight.is_floating_point()
    per_group = torch.empty(rows, dtype=torch.int64)
    minus = library.secateur_sparse_count(
        weight.data_ptr(), rows, columns, bytes_, signed, per_group.data_ptr()
    )
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), per_group.cumsum(0)])
    mask = torch.empty(rows, words, dtype=torch.int64)
    negative = torch.empty(rows, words, dtype=torch.int64) if minus else None
    count = int(offsets[-1])
    values = torch.empty(count, dtype=weight.dtype)
    library.secateur_sparse_encode(
        weight.data_ptr(), rows, columns, bytes_, signed, mask.data_ptr(), _at(negative), values.data_ptr(),
        offsets.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return Encoded(mask, negative, values, per_group, count)


def signs(weight: Tensor) -> Tensor | None:
    """A bitmask of the zeros that have a sign, None where none has."""
    minus = (weight == 0) & weight.signbit()
    return _words(minus.numpy()) if bool(minus.any()) else None


def decode(packed: Packed, first: int = 0, last: int | None = None) -> Tensor:
    """The rows first..last-1 in the type of the values, int4 as int8, without scales."""
    last = packed.rows if last is None else last
    rows = last - first
    if packed.lanes is not None:
        return _decode_semi(packed, packed.lanes, first, last)
    if packed.form == "dense":
        return packed.values[first * packed.columns : last * packed.columns].view(rows, packed.columns)
    library = native.library()
    if library is None:
        return _decode_in_numpy(packed)[first:last]
    if packed.block > 1 or packed.kind == "int4":
        return _decode_blocks(packed, first, last)
    negative, offsets = None if packed.negative is None else packed.negative[first:last], packed.offsets[first:]
    mask = _mask_of_index(packed, first, last) if packed.mask is None else packed.mask[first:last]
    dense = torch.empty(rows, packed.columns, dtype=packed.values.dtype)
    library.secateur_sparse_decode(
        mask.data_ptr(), _at(negative), packed.values.data_ptr(), offsets.data_ptr(), rows, packed.columns,
        dense.element_size(), dense.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dense


def spans(mask: Tensor, columns: int, per_group: Tensor) -> tuple[Tensor, Tensor]:
    """Counts in every 256 columns, and the columns in them, of a bitmask with so many bits a row."""
    library, (rows, _), width = native.library(), mask.shape, -(-columns // 256)
    if library is None:
        kept = bits_of(mask, columns)
        counts = np.stack([kept[:, i * 256 : (i + 1) * 256].sum(1) for i in range(width)], 1)
        return torch.from_numpy(counts.astype(np.int16)), torch.from_numpy(
            (np.nonzero(kept)[1] % 256).astype(np.uint8)
        )
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), per_group.cumsum(0)])
    found = torch.empty(rows, width, dtype=torch.int16)
    index = torch.empty(int(offsets[-1]), dtype=torch.uint8)
    library.secateur_sparse_spans(
        mask.data_ptr(),
        rows,
        columns,
        offsets.data_ptr(),
        found.data_ptr(),
        index.data_ptr(),
        torch.get_num_threads(),
    )
    return found, index


def scaled(packed: Packed, raw: Tensor, first: int = 0) -> Tensor:
    """Decoded rows as they count: integers times their scales."""
    if packed.scale is None:
        return raw
    scale = packed.scale[first : first + len(raw)]
    wide = raw.to(torch.float32, copy=True).view(len(raw), scale.shape[1], -1)
    # in place: fresh memory costs more than the product
    return wide.mul_(scale[..., None]).view(len(raw), packed.columns)


class Product:
    """`x w^T + bias` in float32 by the native kernels, with everything but x looked up once.

    The matrix's tensors are not held, only where they are: who calls holds them. Several threads may call at once.

    Args:
        packed: the matrix; integers of whole rows meet inputs rounded to integers, token by token, where the way is 0.
        bias: `(rows)`, or None; of another type than float32 it is converted at every call.
    """

    def __init__(self, packed: Packed, bias: Tensor | None):
        library = native.library()
        assert library is not None
        self._multiply, self.rows, self.columns = library.secateur_sparse_multiply, packed.rows, packed.columns
        self._threaded = packed.rows * packed.columns > ALONE
        self._bias = None if bias is None else bias.detach()
        plain = bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
        self._bias_at = (_at(bias) or 0) if plain else None
        self._matrix = tuple(
            _at(tensor) or 0
            for tensor in (
                packed.mask, packed.counts, packed.index, packed.values, packed.offsets, packed.scale, packed.codebook
            )
        )  # fmt: skip
        self._numbers = (
            FORM[packed.form], KIND[packed.kind], packed.block, packed.rows, packed.columns,
            1 if packed.scale is None else packed.scale.shape[1],
        )  # fmt: skip
        self._level = level()

    def __call__(self, x: Tensor, way: int) -> Tensor | None:
        """None where x holds NaN or Inf, which the kernels leave to torch; MemoryError where its copies have no room.

        Args:
            x: float32 `(..., columns)`, contiguous.
            way: 0 straight from the stream, or through tile registers, where there is such a way; 1 with tokens side by
                side, for any batch.
        """
        y = x.new_empty((*x.shape[:-1], self.rows))
        bias_at = self._bias_at
        if bias_at is None:
            assert self._bias is not None
            bias = self._bias.float().contiguous()
            bias_at = bias.data_ptr()
        threads = torch.get_num_threads() if self._threaded else 1
        pointers = _POINTERS.pack(*self._matrix, x.data_ptr(), bias_at, y.data_ptr())
        numbers = _NUMBERS.pack(*self._numbers, x.numel() // self.columns, way, threads, self._level)
        code = self._multiply(pointers, numbers)
        if code == SHORT:
            raise MemoryError(f"no memory to make {x.numel() // self.columns:,} inputs ready")
        return None if code else y


def mask_of(packed: Packed) -> Tensor:
    """The bitmask of single weights, in whatever form."""
    if packed.mask is not None:
        return packed.mask
    if packed.form == "index" and native.library() is not None:
        return _mask_of_index(packed, 0, packed.rows)
    return _words((decode(packed) != 0).numpy())


def bits_of(mask: Tensor, columns: int) -> np.ndarray:
    """A bitmask as booleans, `(groups, columns)`."""
    flat = np.unpackbits(mask.numpy().view(np.uint8), axis=1, bitorder="little")
    return flat[:, :columns].astype(bool)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _words(kept: np.ndarray) -> Tensor:
    groups, columns = kept.shape
    wide = np.zeros((groups, -(-columns // 64) * 64), dtype=bool)
    wide[:, :columns] = kept
    return torch.from_numpy(np.packbits(wide, axis=1, bitorder="little").view(np.int64))


def _encode_blocks(weight: Tensor, block: int, across: int) -> Encoded:
    library, (rows, columns) = native.library(), weight.shape
    assert library is not None
    groups, threads = -(-rows // block), torch.get_num_threads()
    size = (rows, columns, block, across, weight.element_size())
    per_group = torch.empty(groups, dtype=torch.int64)
    mask = torch.empty(groups, -(-columns // (64 * across)), dtype=torch.int64)
    negative = None
    for again in (False, True):
        minus = library.secateur_sparse_block_bits(
            weight.data_ptr(),
            *size,
            weight.is_floating_point(),
            mask.data_ptr(),
            _at(negative),
            per_group.data_ptr(),
            threads,
        )
        if again or not minus:
            break
        negative = torch.empty(rows, -(-columns // 64), dtype=torch.int64)
    each = per_group * (block * across)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), each.cumsum(0)])
    values = torch.empty(int(offsets[-1]), dtype=weight.dtype)
    library.secateur_sparse_block_values(
        weight.data_ptr(), *size, mask.data_ptr(), offsets.data_ptr(), values.data_ptr(), threads
    )
    return Encoded(mask, negative, values, per_group, len(values))


def _decode_blocks(packed: Packed, first: int, last: int) -> Tensor:
    """Rows of blocks, or of 4-bit codes; whole block rows are decoded and cut."""
    library, block, columns = native.library(), packed.block, packed.columns
    assert library is not None
    group, end = first // block, -(-last // block)
    start, stop = group * block, min(packed.rows, end * block)
    mask = _mask_of_index(packed, group, end) if packed.mask is None else packed.mask[group:end]
    negative = None if packed.negative is None else packed.negative[start:stop]
    integers = packed.kind == "int4"
    dense = torch.empty(stop - start, columns, dtype=torch.int8 if integers else packed.values.dtype)
    library.secateur_sparse_block_rows(
        mask.data_ptr(), _at(negative), packed.values.data_ptr(), packed.offsets[group:].data_ptr(),
        _at(packed.codebook), stop - start, columns, block, packed.across, dense.element_size(), dense.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return dense[first - start : last - start]


def codes(values: Tensor, each: Tensor, starts: Tensor) -> Tensor:
    """Integers in [-7, 7] as 4-bit codes, two in a byte: `each` for every block row, from its start on."""
    library, whole = native.library(), -(-int(starts[-1]) // 2)
    if library is None:
        found = np.zeros(2 * whole, dtype=np.uint8)
        source = torch.cat([torch.zeros(1, dtype=torch.int64), each.cumsum(0)])
        shift = torch.repeat_interleave(starts[:-1] - source[:-1], each)
        found[(torch.arange(len(values)) + shift).numpy()] = values.numpy().view(np.uint8) & 15
        return torch.from_numpy(found[0::2] | (found[1::2] << 4))
    made = torch.zeros(whole, dtype=torch.uint8)
    library.secateur_sparse_codes(
        values.data_ptr(), each.data_ptr(), starts.data_ptr(), len(each), made.data_ptr()
    )
    return made


def _encode_in_numpy(weight: Tensor, block: int, across: int) -> Encoded:
    rows, columns = weight.shape
    groups, units = -(-rows // block), -(-columns // across)
    wide = torch.zeros(groups * block, units * across, dtype=weight.dtype)
    wide[:rows, :columns] = weight
    tiles = wide.view(groups, block, units, across).transpose(1, 2).flatten(2)
    kept = (tiles != 0).any(2)
    negative = None
    if weight.is_floating_point():
        cut = ~kept.repeat_interleave(block, 0)[:rows]
        minus = (weight == 0) & weight.signbit() & cut
        if bool(minus.any()):
            negative = _words(minus.numpy())
    return Encoded(
        _words(kept.numpy()), negative, tiles[kept].reshape(-1), kept.sum(1), int(kept.sum()) * block * across
    )


def _decode_semi(packed: Packed, lanes: semi.Lanes, first: int, last: int) -> Tensor:
    """Rows of N:M, or of dense 4-bit codes, on any device."""
    size = lanes.stored // 2 if lanes.codes else lanes.stored
    values = packed.values[first * size : last * size].view(last - first, size)
    if lanes.codes:
        assert packed.codebook is not None
        values = semi.integers_of(values, packed.codebook)
    if lanes.whole:
        return values[:, : lanes.columns].contiguous()
    assert packed.index is not None
    dense = semi.unpack_rows(values, packed.index[first:last], lanes)
    if packed.negative is not None:
        bits = torch.from_numpy(bits_of(packed.negative[first:last].cpu(), packed.columns)).to(dense.device)
        dense = torch.where(bits, torch.tensor(-0.0, dtype=dense.dtype, device=dense.device), dense)
    return dense


def _mask_of_index(packed: Packed, first: int, last: int) -> Tensor:
    assert packed.counts is not None
    assert packed.index is not None
    offsets, mask = (
        packed.offsets[first:],
        torch.empty(last - first, -(-packed.columns // 64), dtype=torch.int64),
    )
    native.library().secateur_sparse_bits(  # type: ignore[union-attr]
        packed.counts[first:].data_ptr(), packed.index.data_ptr() + int(offsets[0]), last - first, packed.columns,
        offsets.data_ptr(), mask.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return mask


def _decode_in_numpy(packed: Packed) -> Tensor:
    groups, columns, block, across = packed.groups, packed.units, packed.block, packed.across
    if packed.form == "index":
        assert packed.counts is not None
        assert packed.index is not None
        each = packed.counts.long().flatten()
        places = torch.repeat_interleave(torch.arange(len(each)), each)
        spans = packed.counts.shape[1]
        kept = torch.zeros(groups, columns, dtype=torch.bool)
        kept[places // spans, places % spans * 256 + packed.index.long()] = True
    else:
        assert packed.mask is not None
        kept = torch.from_numpy(bits_of(packed.mask, columns))
    values = packed.values[: packed.nonzeros]
    if packed.kind == "int4":
        assert packed.codebook is not None
        both = torch.stack([packed.values & 15, packed.values >> 4], 1).view(-1)
        size = packed.per_group * block
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)])[:-1]
        shift = torch.repeat_interleave(packed.offsets[:-1] - starts, size)
        values = packed.codebook[both[torch.arange(packed.nonzeros) + shift].long()]
    dense = torch.zeros(groups, columns, block * across, dtype=values.dtype)
    dense[kept] = values.view(-1, block * across)
    tiles = dense.view(groups, columns, block, across).transpose(1, 2)
    found = tiles.reshape(groups * block, columns * across)[: packed.rows, : packed.columns]
    if packed.negative is not None:
        found = torch.where(torch.from_numpy(bits_of(packed.negative, columns)), -0.0, found)
    return found.contiguous()
