"""The same files on a GPU: Triton kernels that multiply one token or make rows dense; torch's own kernels for 2:4.

Triton comes with torch's CUDA builds and is imported when a kernel is first used. Without it, or for a form that its
kernels do not read, torch unpacks the rows, on the same device, and multiplies.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from secateur.deploy.sparse.kernels import decode, scaled
from secateur.deploy.sparse.packed import CODEBOOK, KINDS, PADDING, SPAN, WORD, Packed
from secateur.deploy.sparse.semi import integers_of
from secateur.errors import UsageError

__all__ = ["multiply", "rows_of", "semi_structured_", "triton_product", "triton_rows"]

# A product: bytes of a mask in one step, so that a warp takes a row and waits for no other; steps at most whose loads
# are on their way at once. Rows made dense: bytes of a mask in one step of several warps, which store side by side.
LANES, UNROLLED, WIDE = 32, 16, 512
PANEL = 1 << 27  # weights that are made dense at a time
CODES = 1 << 24  # the same by torch, which takes several times their bytes
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
# streams of int4: their version, and whether codes are the integers themselves
_plain: Any = WeakIdKeyDictionary()


def multiply(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x w^T + bias` on the device of x.

    Args:
        packed: on the same device.
        x: `(batch, columns)`. One token is multiplied in float32, more in the type of x.
        bias: `(rows)`, or None.
    """
    fast = _reads(packed, x) and _kernels() is not None
    if fast and len(x) == 1:
        return triton_product(packed, x, bias)
    bias = None if bias is None else bias.to(x.dtype)
    if not fast and not packed.in_lanes:
        weight = rows_of(packed, torch.arange(packed.rows, device=x.device))
        return F.linear(x, weight.to(x.dtype), bias)
    if not fast:
        return _by_panels(packed, x, bias)
    step = max(1, PANEL // packed.columns // 16) * 16  # so that a panel's parts are as aligned as the whole's
    if packed.rows <= step:
        return F.linear(x, triton_rows(packed, x.dtype), bias)
    panels = (
        F.linear(x, triton_rows(packed, x.dtype, first, min(packed.rows, first + step)))
        for first in range(0, packed.rows, step)
    )
    y = torch.cat(list(panels), -1)
    return y if bias is None else y + bias


def _by_panels(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """Rows made dense by torch, so many at a time that what that takes beside them stays small."""
    step = max(1, CODES // packed.columns)
    panels = (
        F.linear(x, scaled(packed, decode(packed, first, min(packed.rows, first + step)), first).to(x.dtype))
        for first in range(0, packed.rows, step)
    )
    y = torch.cat(list(panels), -1)
    return y if bias is None else y + bias


def rows_of(packed: Packed, rows: Tensor) -> Tensor:
    """Some rows made dense by torch alone, on any device; integers times their scales.

    Args:
        packed: a bitmask of single weights, or dense integers; other forms are unpacked whole.
        rows: `(n)`, int64.
    """
    columns = packed.columns
    if packed.form == "dense" and packed.kind == "int8":
        assert packed.scale is not None
        raw = packed.values[: packed.rows * columns].view(packed.rows, columns)
        return F.embedding(rows, raw).float() * F.embedding(rows, packed.scale)
    if packed.form == "dense":
        found = _of_codes(packed, rows)
    elif packed.in_lanes:
        found = decode(packed)[rows]
    elif packed.form == "index":
        found = _of_index(packed)[rows]
    elif packed.block > 1:  # squares too
        found = _of_blocks(packed)[rows]
    else:
        found = _of_mask(packed, rows)[:, :, 0]
    if packed.scale is None:
        return found
    groups = packed.scale.shape[1]
    wide = found.float().view(len(rows), groups, columns // groups)
    return (wide * packed.scale[rows][..., None]).view(len(rows), columns)


def _of_codes(packed: Packed, rows: Tensor) -> Tensor:
    """Rows of dense 4-bit codes."""
    assert packed.codebook is not None
    size = (
        packed.values.numel() - PADDING
    ) // packed.rows  # not from the offsets: they are data to who traces this
    codes = F.embedding(rows, packed.values[: packed.rows * size].view(packed.rows, size))
    return integers_of(codes, packed.codebook)[:, : packed.columns]


def _of_mask(packed: Packed, groups: Tensor) -> Tensor:
    """Block rows of a bitmask, `(n, units, values of a block)`, without scales."""
    assert packed.mask is not None
    lanes = torch.arange(WORD, device=groups.device)
    kept = ((packed.mask[groups][:, :, None] >> lanes) & 1).flatten(1)[:, : packed.units]
    size = packed.block * packed.across
    places = packed.offsets[groups][:, None] + (kept.cumsum(1) - kept) * size
    places = places[:, :, None] + torch.arange(size, device=groups.device)
    # behind the last value only weights that are not kept point
    found = _values(packed, places.clamp(max=packed.values.numel() * (1 + (packed.kind == "int4")) - 1))
    return torch.where(kept.bool()[:, :, None], found, found.new_zeros(()))


def _of_blocks(packed: Packed) -> Tensor:
    """All rows of a bitmask of blocks."""
    found = _of_mask(packed, torch.arange(packed.groups, device=packed.values.device))
    tiles = found.unflatten(2, (packed.block, packed.across)).transpose(1, 2)
    return tiles.reshape(packed.groups * packed.block, -1)[: packed.rows, : packed.columns]


def _of_index(packed: Packed) -> Tensor:
    """All rows of the index form: every value finds the span that it is in by how many come before."""
    assert packed.counts is not None
    assert packed.index is not None
    rows, spans = packed.counts.shape
    place = torch.arange(packed.index.numel(), device=packed.values.device)
    span = torch.searchsorted(packed.counts.flatten().long().cumsum(0), place, right=True)
    values = _values(packed, place)
    dense = values.new_zeros(rows, spans * SPAN)
    dense[span // spans, span % spans * SPAN + packed.index.long()] = values
    return dense[:, : packed.columns]


def _values(packed: Packed, places: Tensor) -> Tensor:
    """What lies at these places of the stream; the integers of int4's codes."""
    if packed.kind != "int4":
        return packed.values[places]
    assert packed.codebook is not None
    return packed.codebook[(packed.values[places >> 1].long() >> ((places & 1) << 2)) & 15]


_making = Lock()


def _kernels() -> Any:
    """The module of kernels, made Triton's once; None where Triton is missing."""
    with _making:  # the first of several threads makes it, the others wait
        return _made()


@cache
def _made() -> Any:
    try:
        import triton
        import triton.language
    except ImportError:
        return None
    from secateur.deploy.sparse import bitmask_kernel

    bitmask_kernel.tl = triton.language
    for name in bitmask_kernel.FUNCTIONS:
        setattr(bitmask_kernel, name, triton.jit(getattr(bitmask_kernel, name)))
    return bitmask_kernel


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reads(packed: Packed, x: Tensor) -> bool:
    """Whether the kernels read this form, meet such inputs, and run where they are."""
    here = x.device.type == "cuda" or (x.device.type == "cpu" and _interpreted())
    return packed.form == "bitmask" and packed.block == 1 and x.dtype in INPUTS and len(x) > 0 and here


def _given(packed: Packed, first: int, lanes: int, most: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What both kernels take of a matrix from a row on: tensors, and numbers that they are compiled for."""
    assert packed.mask is not None
    steps = -(-packed.columns // (8 * lanes))
    rounds = -(-steps // most)
    none = packed.offsets  # stands in for what a kind has not
    tensors = packed.mask[first:].view(torch.uint8), packed.values, packed.offsets[first:]
    scale = none if packed.scale is None else packed.scale[first:]
    return (*tensors, scale, none if packed.codebook is None else packed.codebook), {
        "KIND": KINDS.index(packed.kind), "PLAIN": packed.codebook is None or _is_plain(packed, packed.codebook),
        "COLUMNS": packed.columns, "GROUPS": 1 if packed.scale is None else packed.scale.shape[1],
        "LANES": lanes, "ROUNDS": rounds, "UNROLLED": -(-steps // rounds), "ASM": not _interpreted(),
    }  # fmt: skip


def _is_plain(packed: Packed, codebook: Tensor) -> bool:
    """Whether int4's codes are integers of 4 bits; looked up once, since it waits for the device.

    The codebook that `pack` gives has a second 0 where -8 would be, a code that it does not use.
    """
    values, known = packed.values, _plain.get(packed.values)
    state = values.data_ptr(), *(t.is_inference() or t._version for t in (values, codebook))
    if known is None or known[0] is not codebook or known[1] != state:
        eights = ((values & 15) == 8).any() | ((values >> 4) == 8).any()
        known = codebook, state, not bool(eights) and torch.equal(codebook.cpu(), CODEBOOK)
        _plain[values] = known
    return bool(known[2])


def _ready() -> Any:
    kernels = _kernels()
    if kernels is None:
        raise UsageError("the kernels for GPUs need triton, which comes with torch's CUDA builds")
    return kernels


def _on(device: torch.device) -> Any:
    """Triton starts kernels on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def triton_product(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x w^T + bias` of a bitmask of single weights and one token, by Triton, in float32 sums; the type of x.

    Raises:
        UsageError: Triton is missing.
    """
    kernels = _ready()
    y = torch.empty(1, packed.rows, dtype=x.dtype, device=x.device)
    most = UNROLLED // 2 if packed.kind == "int4" else UNROLLED  # more takes long to compile
    tensors, numbers = _given(packed, 0, LANES, most)
    x, given = x.contiguous(), packed.offsets if bias is None else bias.contiguous()
    pairs = x.dtype == torch.bfloat16 and packed.columns % 2 == 0 and x.data_ptr() % 4 == 0
    with _on(x.device):
        kernels.bitmask_product[(packed.rows,)](
            x, *tensors, given, y, BIASED=bias is not None, PAIRS=pairs, num_warps=1, **numbers
        )
    return y


def triton_rows(packed: Packed, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """The rows first..last-1 of a bitmask of single weights made dense by Triton, in a floating-point type.

    Raises:
        UsageError: Triton is missing.
    """
    kernels = _ready()
    rows = (packed.rows if last is None else last) - first
    y = torch.empty(rows, packed.columns, dtype=dtype, device=packed.values.device)
    lanes = min(WIDE, 1 << (-(-packed.columns // 8) - 1).bit_length())
    tensors, numbers = _given(packed, first, lanes, 1)
    with _on(y.device):
        kernels.bitmask_rows[(rows,)](*tensors, y, num_warps=max(1, lanes // 64), **numbers)
    return y


@torch.no_grad()
def semi_structured_(model: nn.Module) -> list[str]:
    """Give linear layers whose weights keep at most 2 of every 4 torch's semi-structured tensors, in place.

    For inference in float16 or bfloat16 on a GPU of compute capability 8.0 or later: prefill and large batches; for one
    token 2:4 saves no bytes over a bitmask. Measure before use.

    Returns:
        Names of the weights that were converted.

    Raises:
        UsageError: the model is on no such GPU, or no layer keeps 2 of 4.
    """
    from torch.sparse import to_sparse_semi_structured

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise UsageError(
            f"the model lies on {device}; semi-structured tensors need a GPU of NVIDIA: model.cuda()"
        )
    done = []
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.dtype in (torch.float16, torch.bfloat16):
            weight = module.weight
            rows, columns = weight.shape
            if columns % 64 or rows % 32 or bool(((weight != 0).view(rows, -1, 4).sum(2) > 2).any()):
                continue
            module.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)
            done.append(f"{path}.weight" if path else "weight")
    if not done:
        raise UsageError(
            "no linear layer in float16 or bfloat16 keeps 2 of every 4 inputs; prune with pattern NM(2, 4) first"
        )
    return done
