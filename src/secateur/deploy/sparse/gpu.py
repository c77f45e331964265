"""The same files on a GPU: one Triton kernel for few tokens, rows unpacked for more; torch's own kernels for 2:4.

Triton comes with torch's CUDA builds and is imported when the kernel is first used. Without it, or for a form that it
does not read, rows are unpacked and torch multiplies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.deploy.sparse.packed import KINDS, WORD, Packed
from secateur.errors import UsageError

__all__ = ["FEW", "multiply", "rows_of", "semi_structured_", "triton_product"]

FEW = 8  # tokens that the kernel takes
COLUMNS = 512  # that a program looks at in one step


def multiply(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x w^T + bias` on the device of x.

    Args:
        packed: on the same device.
        x: `(batch, columns)`.
        bias: `(rows)`, or None.
    """
    if len(x) and len(x) <= FEW and packed.form == "bitmask" and packed.block == 1 and _kernel() is not None:
        y = triton_product(packed, x)
        return y if bias is None else y + bias.to(y.dtype)
    weight = rows_of(packed, torch.arange(packed.rows, device=x.device))
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def rows_of(packed: Packed, rows: Tensor) -> Tensor:
    """Some rows made dense by torch alone, on any device; integers times their scales.

    Args:
        packed: a bitmask of single weights, or dense integers; other forms are unpacked whole.
        rows: `(n)`, int64.
    """
    columns = packed.columns
    if packed.block > 1 or packed.form == "index":
        return packed.to("cpu").dense().to(packed.values.device)[rows]
    if packed.form == "dense":
        assert packed.scale is not None
        raw = packed.values[: packed.rows * columns].view(packed.rows, columns)
        return F.embedding(rows, raw).float() * F.embedding(rows, packed.scale)
    assert packed.mask is not None
    lanes = torch.arange(WORD, device=rows.device)
    kept = ((packed.mask[rows][:, :, None] >> lanes) & 1).flatten(1)[:, :columns]
    places = (packed.offsets[rows][:, None] + kept.cumsum(1) - kept).clamp(max=_last(packed))
    if packed.kind == "int4":
        assert packed.codebook is not None
        codes = (packed.values[places >> 1].long() >> ((places & 1) << 2)) & 15
        found = packed.codebook[codes]
    else:
        found = packed.values[places]
    found = torch.where(kept.bool(), found, found.new_zeros(()))
    if packed.scale is None:
        return found
    groups = packed.scale.shape[1]
    wide = found.float().view(len(rows), groups, columns // groups)
    return (wide * packed.scale[rows][..., None]).view(len(rows), columns)


def _last(packed: Packed) -> int:
    """A place that can be read; behind it only weights that are not kept point."""
    return packed.values.numel() * (2 if packed.kind == "int4" else 1) - 1


@cache
def _kernel() -> Any:
    """The compiled kernel; None where Triton is missing."""
    try:
        import triton
        import triton.language
    except ImportError:
        return None
    from secateur.deploy.sparse import bitmask_kernel

    bitmask_kernel.tl = triton.language
    return triton.jit(bitmask_kernel.bitmask_product)


def triton_product(packed: Packed, x: Tensor) -> Tensor:
    """`x w^T` of a bitmask of single weights, by Triton, in float32 sums; the type of x.

    Raises:
        UsageError: Triton is missing.
    """
    kernel = _kernel()
    if kernel is None:
        raise UsageError("the kernel for GPUs needs triton, which comes with torch's CUDA builds")
    batch, width = x.shape[0], packed.columns
    y = torch.empty(batch, packed.rows, dtype=torch.float32, device=x.device)
    groups = 1 if packed.scale is None else packed.scale.shape[1]
    empty = packed.offsets  # stands in for what a kind has not
    kernel[(packed.rows,)](
        x.contiguous(), packed.mask, packed.values, packed.offsets,
        empty if packed.scale is None else packed.scale, empty if packed.codebook is None else packed.codebook, y,
        packed.rows, width, -(-width // WORD), batch, width // groups, groups,
        KIND=KINDS.index(packed.kind), BATCH=1 << (batch - 1).bit_length(), COLUMNS=COLUMNS, STEPS=-(-width // COLUMNS),
    )  # fmt: skip
    return y.to(x.dtype)


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
