"""The Triton kernel of a bitmask's product, apart because its body is Triton's language and not Python.

Triton compiles the function's source; `tl` is set where Triton is imported, and the annotations are words until then.
"""

from __future__ import annotations

from typing import Any

__all__ = ["bitmask_product"]

tl: Any = None  # triton.language, once it is needed


def bitmask_product(
    x, mask, values, offsets, scale, codebook, y, rows, columns, words, batch, group, groups,
    KIND: tl.constexpr, BATCH: tl.constexpr, COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One row of the matrix with every token: bits, places of values by counting bits, multiply and add.

    KIND is the place in `KINDS`: 0 to 2 floating point, 3 int8 with a scale a row, 4 int4 with one for each group.
    """
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BATCH)
    lanes = tl.arange(0, COLUMNS)
    total = tl.zeros((BATCH,), dtype=tl.float32)
    base = tl.load(offsets + row)
    for step in range(STEPS):
        at = step * COLUMNS + lanes
        inside = at < columns
        word = tl.load(mask + row * words + at // 64, mask=inside, other=0)
        bit = ((word >> (at % 64).to(tl.int64)) & 1).to(tl.int32)
        kept = (bit == 1) & inside
        place = base + (tl.cumsum(bit, 0) - bit).to(tl.int64)
        if KIND == 4:
            both = tl.load(values + place // 2, mask=kept, other=0).to(tl.int32)
            code = (both >> ((place % 2) * 4).to(tl.int32)) & 15
            weight = tl.load(codebook + code, mask=kept, other=0).to(tl.float32)
            weight *= tl.load(scale + row * groups + at // group, mask=kept, other=0.0)
        else:
            weight = tl.load(values + place, mask=kept, other=0).to(tl.float32)
        use = inside[None, :] & (tokens < batch)[:, None]
        inputs = tl.load(x + tokens[:, None] * columns + at[None, :], mask=use, other=0.0).to(tl.float32)
        total += tl.sum(inputs * weight[None, :], 1)
        base += tl.sum(bit, 0)
    if KIND == 3:
        total *= tl.load(scale + row)
    tl.store(y + tokens * rows + row, total, mask=tokens < batch)
