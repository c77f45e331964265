"""The Triton kernels of a bitmask, apart because their bodies are Triton's language and not Python.

Triton compiles the functions' sources; `tl` is set, and the functions are made Triton's, where Triton is imported; the
annotations are words until then. A lane holds a byte of the mask and the 8 columns that it stands for. One that held a
column would count bits, compute an address and convert for zeros as much as for weights: twice the instructions, and
instructions are what limits these kernels.
"""

from __future__ import annotations

from typing import Any

__all__ = ["FUNCTIONS", "bitmask_product", "bitmask_rows"]

FUNCTIONS = (
    "ones",
    "window",
    "one",
    "eight_values",
    "eight_inputs",
    "bytes_of",
    "bitmask_product",
    "bitmask_rows",
)
tl: Any = None  # triton.language, once it is needed


def ones(v, ASM: tl.constexpr):
    """Bits that are set in a byte; the instruction for it is not known to the interpreter."""
    if ASM:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)
    v = v - ((v >> 1) & 0x55)
    v = (v & 0x33) + ((v >> 2) & 0x33)
    return (v + (v >> 4)) & 15


def window(at):
    """The 8 bytes at any address as one number, from the two aligned words that hold them."""
    words = (at & -8).to(tl.pointer_type(tl.uint64))
    by = ((at & 7) << 3).to(tl.uint64)
    return (tl.load(words) >> by) | ((tl.load(words + 1) << 1) << (63 - by))


def one(values, place, queue, byte, J: tl.constexpr, codebook, KIND: tl.constexpr, PLAIN: tl.constexpr):
    """Value J of eight, 0 where its bit is not set, and what is left of the queue and the stream.

    Integers wait in a queue, the next one lowest. The bits of a small integer, its sign turned round, under the
    exponent of 2^23 are a float that lies so much above it.
    """
    keep = (byte & (1 << J)) != 0
    if KIND == 4:
        if PLAIN:
            value = ((queue.to(tl.int32) & 15) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
        else:
            value = tl.load(codebook + (queue.to(tl.int32) & 15)).to(tl.float32)
        return tl.where(keep, value, 0.0), place, tl.where(keep, queue >> 4, queue)
    if KIND == 3:
        value = ((queue.to(tl.int32) & 255) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
        return tl.where(keep, value, 0.0), place, tl.where(keep, queue >> 8, queue)
    value = tl.load(values + place, mask=keep, other=0).to(tl.float32)
    return value, place + keep.to(tl.int32), queue


def eight_values(values, start, place, byte, codebook, KIND: tl.constexpr, PLAIN: tl.constexpr):
    """What a byte of the mask stands for, in float32 and without scales.

    KIND is the place in `KINDS`: 0 to 2 floating point, 3 int8, 4 int4. PLAIN: the codes of int4 are its integers.
    `start` is where the row starts in the stream, `place` where the byte does from there on.
    """
    if KIND == 4:
        at = values.to(tl.int64, bitcast=True) + ((start + place) >> 1)
        queue = (window(at) >> ((place & 1) << 2).to(tl.uint64)).to(tl.uint32)
    elif KIND == 3:
        queue = window(values.to(tl.int64, bitcast=True) + (start + place))
    else:
        queue = place
    here = values + start
    w0, place, queue = one(here, place, queue, byte, 0, codebook, KIND, PLAIN)
    w1, place, queue = one(here, place, queue, byte, 1, codebook, KIND, PLAIN)
    w2, place, queue = one(here, place, queue, byte, 2, codebook, KIND, PLAIN)
    w3, place, queue = one(here, place, queue, byte, 3, codebook, KIND, PLAIN)
    w4, place, queue = one(here, place, queue, byte, 4, codebook, KIND, PLAIN)
    w5, place, queue = one(here, place, queue, byte, 5, codebook, KIND, PLAIN)
    w6, place, queue = one(here, place, queue, byte, 6, codebook, KIND, PLAIN)
    w7, place, queue = one(here, place, queue, byte, 7, codebook, KIND, PLAIN)
    return w0, w1, w2, w3, w4, w5, w6, w7


def eight_inputs(x, at, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """The inputs of the same columns, read at once."""
    column = at[:, None] * 8 + tl.arange(0, 8)[None, :]
    x8 = tl.load(x + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x8, (LANES, 2, 2, 2)))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


def bytes_of(mask, row, step, seen, COLUMNS: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """A step's bytes of a row's mask, where each one's values start in the row, and the values of all of them."""
    wide: tl.constexpr = (COLUMNS + 63) // 64 * 8
    at = step * LANES + tl.arange(0, LANES)
    byte = tl.load(mask + row * wide + at, mask=at < wide, other=0).to(tl.int32)
    count = ones(byte, ASM)
    return at, byte, seen + tl.cumsum(count, 0) - count, tl.sum(count, 0)


def bitmask_product(
    x, mask, values, offsets, scale, codebook, bias, y,
    KIND: tl.constexpr, PLAIN: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BIASED: tl.constexpr,
    LANES: tl.constexpr, ROUNDS: tl.constexpr, UNROLLED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One row of the matrix with one token: sums in float32, every input multiplied, with zeros too."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    total = tl.zeros((LANES,), dtype=tl.float32)
    seen = 0
    for around in range(ROUNDS):
        for inner in tl.static_range(UNROLLED):
            at, byte, place, count = bytes_of(mask, row, around * UNROLLED + inner, seen, COLUMNS, LANES, ASM)
            w0, w1, w2, w3, w4, w5, w6, w7 = eight_values(values, start, place, byte, codebook, KIND, PLAIN)
            x0, x1, x2, x3, x4, x5, x6, x7 = eight_inputs(x, at, COLUMNS, LANES)
            some = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3 + w4 * x4 + w5 * x5 + w6 * x6 + w7 * x7
            if KIND == 4:
                factor = scale + row * GROUPS + at * 8 // (COLUMNS // GROUPS)
                some *= tl.load(factor, mask=at * 8 < COLUMNS, other=0.0)
            total += some
            seen += count
    found = tl.sum(total, 0)
    if KIND == 3:
        found *= tl.load(scale + row)
    if BIASED:
        found += tl.load(bias + row).to(tl.float32)
    tl.store(y + row, found.to(y.dtype.element_ty))


def bitmask_rows(
    mask, values, offsets, scale, codebook, y, first,
    KIND: tl.constexpr, PLAIN: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    LANES: tl.constexpr, ROUNDS: tl.constexpr, UNROLLED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One row of the matrix made dense, from row `first` on; integers times their scales."""
    to = tl.program_id(0).to(tl.int64)
    row = to + first
    start = tl.load(offsets + row)
    seen = 0
    for around in range(ROUNDS):
        for inner in tl.static_range(UNROLLED):
            at, byte, place, count = bytes_of(mask, row, around * UNROLLED + inner, seen, COLUMNS, LANES, ASM)
            w0, w1, w2, w3, w4, w5, w6, w7 = eight_values(values, start, place, byte, codebook, KIND, PLAIN)
            even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
            odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
            w = tl.reshape(tl.join(even, odd), (LANES, 8))
            if KIND == 3:
                w *= tl.load(scale + row)
            if KIND == 4:
                factor = scale + row * GROUPS + at * 8 // (COLUMNS // GROUPS)
                w *= tl.load(factor, mask=at * 8 < COLUMNS, other=0.0)[:, None]
            column = at[:, None] * 8 + tl.arange(0, 8)[None, :]
            tl.store(y + to * COLUMNS + column, w.to(y.dtype.element_ty), mask=column < COLUMNS)
            seen += count
