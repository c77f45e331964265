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
    "ones", "window", "fetched", "one", "code", "eight_values", "eight_inputs", "bytes_of",
    "bitmask_product", "bitmask_rows",
)  # fmt: skip
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


def fetched(base, at, byte, J: tl.constexpr, SIZE: tl.constexpr, ASM: tl.constexpr):
    """The bits of the value `at` bytes behind base, 0 where bit J is not set; and where the next one lies.

    In PTX a bit becomes a predicate that the load and the addition share; from Triton's language it takes two
    instructions more.
    """
    if ASM:
        if SIZE == 1:
            return tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b32 t; .reg .b64 a; and.b32 t, $2, $5; setp.ne.b32 p, t, 0; "
                "cvt.u64.u32 a, $3; add.s64 a, a, $4; mov.b32 $0, 0; @p ld.global.nc.u8 $0, [a]; "
                "mov.b32 $1, $3; @p add.u32 $1, $1, 1; }",
                "=&r,=&r,r,r,l,r", [byte, at, base, 1 << J], dtype=(tl.int32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
        elif SIZE == 2:
            return tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b32 t; .reg .b64 a; .reg .b16 h; and.b32 t, $2, $5; setp.ne.b32 p, t, 0; "
                "cvt.u64.u32 a, $3; add.s64 a, a, $4; mov.b16 h, 0; @p ld.global.nc.u16 h, [a]; "
                "cvt.u32.u16 $0, h; mov.b32 $1, $3; @p add.u32 $1, $1, 2; }",
                "=&r,=&r,r,r,l,r", [byte, at, base, 1 << J], dtype=(tl.int32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b32 t; .reg .b64 a; and.b32 t, $2, $5; setp.ne.b32 p, t, 0; "
                "cvt.u64.u32 a, $3; add.s64 a, a, $4; mov.b32 $0, 0; @p ld.global.nc.u32 $0, [a]; "
                "mov.b32 $1, $3; @p add.u32 $1, $1, 4; }",
                "=&r,=&r,r,r,l,r", [byte, at, base, 1 << J], dtype=(tl.int32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
    keep = (byte & (1 << J)) != 0
    where = base + at.to(tl.int64)
    if SIZE == 1:
        bits = tl.load(where.to(tl.pointer_type(tl.uint8)), mask=keep, other=0).to(tl.int32)
    elif SIZE == 2:
        bits = tl.load(where.to(tl.pointer_type(tl.uint16)), mask=keep, other=0).to(tl.int32)
    else:
        bits = tl.load(where.to(tl.pointer_type(tl.int32)), mask=keep, other=0)
    return bits, at + keep.to(tl.uint32) * SIZE


def one(base, at, byte, J: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Value J of eight in float32, 0 where its bit is not set, and where the next one lies.

    The bits of a small integer, its sign turned round, under the exponent of 2^23 are a float that lies so much
    above it.
    """
    if KIND == 3:
        bits, at = fetched(base, at, byte, J, 1, ASM)
        return ((bits & 255) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0, at
    if KIND == 2:
        bits, at = fetched(base, at, byte, J, 2, ASM)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), at
    if KIND == 1:
        bits, at = fetched(base, at, byte, J, 2, ASM)
        return (bits << 16).to(tl.float32, bitcast=True), at
    bits, at = fetched(base, at, byte, J, 4, ASM)
    return bits.to(tl.float32, bitcast=True), at


def code(queue, byte, J: tl.constexpr, codebook, PLAIN: tl.constexpr):
    """The same of codes of 4 bits, which wait in a queue, the next one lowest; and what is left of the queue."""
    keep = (byte & (1 << J)) != 0
    if PLAIN:
        value = ((queue.to(tl.int32) & 15) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    else:
        value = tl.load(codebook + (queue.to(tl.int32) & 15)).to(tl.float32)
    return tl.where(keep, value, 0.0), tl.where(keep, queue >> 4, queue)


def eight_values(
    values, start, place, byte, codebook, KIND: tl.constexpr, PLAIN: tl.constexpr, ASM: tl.constexpr
):
    """What a byte of the mask stands for, in float32 and without scales.

    KIND is the place in `KINDS`: 0 to 2 floating point, 3 int8, 4 int4. PLAIN: the codes of int4 are its integers.
    `start` is where the row starts in the stream, `place` where the byte does from there on.
    """
    stream = values.to(tl.int64, bitcast=True)
    if KIND == 4:
        queue = window(stream + ((start + place) >> 1)) >> ((place & 1) << 2).to(tl.uint64)
        queue = queue.to(tl.uint32)
        w0, queue = code(queue, byte, 0, codebook, PLAIN)
        w1, queue = code(queue, byte, 1, codebook, PLAIN)
        w2, queue = code(queue, byte, 2, codebook, PLAIN)
        w3, queue = code(queue, byte, 3, codebook, PLAIN)
        w4, queue = code(queue, byte, 4, codebook, PLAIN)
        w5, queue = code(queue, byte, 5, codebook, PLAIN)
        w6, queue = code(queue, byte, 6, codebook, PLAIN)
        w7, queue = code(queue, byte, 7, codebook, PLAIN)
    else:
        SIZE: tl.constexpr = 4 if KIND == 0 else 1 if KIND == 3 else 2
        base, at = stream + start * SIZE, (place * SIZE).to(tl.uint32)
        w0, at = one(base, at, byte, 0, KIND, ASM)
        w1, at = one(base, at, byte, 1, KIND, ASM)
        w2, at = one(base, at, byte, 2, KIND, ASM)
        w3, at = one(base, at, byte, 3, KIND, ASM)
        w4, at = one(base, at, byte, 4, KIND, ASM)
        w5, at = one(base, at, byte, 5, KIND, ASM)
        w6, at = one(base, at, byte, 6, KIND, ASM)
        w7, at = one(base, at, byte, 7, KIND, ASM)
    return w0, w1, w2, w3, w4, w5, w6, w7


def eight_inputs(x, at, COLUMNS: tl.constexpr, LANES: tl.constexpr, PAIRS: tl.constexpr):
    """The inputs of the same columns, read at once. PAIRS: bfloat16, two in a number; the upper needs no shift."""
    if PAIRS:
        pair = at[:, None] * 4 + tl.arange(0, 4)[None, :]
        x4 = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + pair, mask=pair < COLUMNS // 2, other=0)
        even, odd = tl.split(tl.reshape(x4, (LANES, 2, 2)))
        p01, p45 = tl.split(even)
        p23, p67 = tl.split(odd)
        x0, x1 = (p01 << 16).to(tl.float32, bitcast=True), (p01 & -65536).to(tl.float32, bitcast=True)
        x2, x3 = (p23 << 16).to(tl.float32, bitcast=True), (p23 & -65536).to(tl.float32, bitcast=True)
        x4, x5 = (p45 << 16).to(tl.float32, bitcast=True), (p45 & -65536).to(tl.float32, bitcast=True)
        x6, x7 = (p67 << 16).to(tl.float32, bitcast=True), (p67 & -65536).to(tl.float32, bitcast=True)
        return x0, x1, x2, x3, x4, x5, x6, x7
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
    PAIRS: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr, UNROLLED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One row of the matrix with one token: sums in float32, every input multiplied, with zeros too."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    total = tl.zeros((LANES,), dtype=tl.float32)
    seen = 0
    for around in range(ROUNDS):
        for inner in tl.static_range(UNROLLED):
            at, byte, place, count = bytes_of(mask, row, around * UNROLLED + inner, seen, COLUMNS, LANES, ASM)
            w0, w1, w2, w3, w4, w5, w6, w7 = eight_values(
                values, start, place, byte, codebook, KIND, PLAIN, ASM
            )
            x0, x1, x2, x3, x4, x5, x6, x7 = eight_inputs(x, at, COLUMNS, LANES, PAIRS)
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
    mask, values, offsets, scale, codebook, y,
    KIND: tl.constexpr, PLAIN: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    LANES: tl.constexpr, ROUNDS: tl.constexpr, UNROLLED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One row of the matrix made dense; integers times their scales."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    seen = 0
    for around in range(ROUNDS):
        for inner in tl.static_range(UNROLLED):
            at, byte, place, count = bytes_of(mask, row, around * UNROLLED + inner, seen, COLUMNS, LANES, ASM)
            w0, w1, w2, w3, w4, w5, w6, w7 = eight_values(
                values, start, place, byte, codebook, KIND, PLAIN, ASM
            )
            even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
            odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
            w = tl.reshape(tl.join(even, odd), (LANES, 8))
            if KIND == 3:
                w *= tl.load(scale + row)
            if KIND == 4:
                factor = scale + row * GROUPS + at * 8 // (COLUMNS // GROUPS)
                w *= tl.load(factor, mask=at * 8 < COLUMNS, other=0.0)[:, None]
            column = at[:, None] * 8 + tl.arange(0, 8)[None, :]
            tl.store(y + row * COLUMNS + column, w.to(y.dtype.element_ty), mask=column < COLUMNS)
            seen += count
