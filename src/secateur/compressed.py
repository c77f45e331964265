"""Reading checkpoints in the two sparse layouts of compressed-tensors, which its makers read no more.

A weight `NAME.weight` lies there as `NAME.shape`, `NAME.bitmask` (uint8, a bit a weight, each row from a whole byte
on, lowest bit first), `NAME.compressed` (the values of set bits, row after row) and, for `sparse-bitmask`,
`NAME.row_offsets` (where each row starts among the values). `sparse-24-bitmask` has two values in every four and
no offsets. Early files say `NAME.weight.shape` and so on. config.json names the layout under
`quantization_config`, `sparsity_config`, `format`.

Source: the layouts as published with compressed-tensors 0.9; written anew, for reading alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import InputError, UsageError

__all__ = ["LAYOUTS", "layout_of", "read_compressed"]

LAYOUTS = ("sparse-bitmask", "sparse-24-bitmask")
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def layout_of(config: Mapping[str, Any]) -> str | None:
    """Which of `LAYOUTS` a config.json names; None where it names none.

    Raises:
        UsageError: the weights are also quantized.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    sparse = found.get("sparsity_config") if isinstance(found, dict) else None
    layout = sparse.get("format") if isinstance(sparse, dict) else None
    if layout not in LAYOUTS:
        return None
    assert isinstance(found, dict)
    if found.get("config_groups"):
        raise UsageError(
            f"the weights are sparse ({layout}) and quantized; weights that are only sparse can be read."
        )
    return str(layout)


def read_compressed(files: Sequence[Path], layout: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name in the model, dense.

    Args:
        files: safetensors files, found sound; parts of a weight may lie in several.
        layout: one of `LAYOUTS`.

    Raises:
        InputError: parts that are missing or contradict each other; names the tensor.
    """
    from safetensors.torch import load_file

    plain: dict[str, Tensor] = {}
    for path in files:
        plain |= load_file(path)
    needed = _PARTS[:3] if layout == "sparse-24-bitmask" else _PARTS
    names = [name.removesuffix(".bitmask") for name in plain if name.endswith(".bitmask")]
    if not names:
        raise InputError(f"{files[0].parent}: config.json says {layout}, but the weights hold no bitmask.")
    dense: dict[str, Tensor] = {}
    for name in names:
        weight = name if name.endswith(".weight") else f"{name}.weight"
        parts = {part: plain.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in plain}
        missing = [part for part in needed if part not in parts]
        wrong = f"{missing[0]} is missing" if missing else _wrong(parts, layout)
        if weight in plain or weight in dense:
            wrong = "the weight is there twice"
        if wrong:
            raise InputError(f"{files[0].parent}: {weight}: {wrong}; the file was altered, or is not {layout}.")
        dense[weight] = _dense(parts)
    return plain | dense


def _wrong(parts: Mapping[str, Tensor], layout: str) -> str:
    """What contradicts itself in one weight; empty where nothing does."""
    values, bits, shape = parts["compressed"], parts["bitmask"], parts["shape"]
    if shape.dtype not in (torch.int64, torch.int32) or not 0 < shape.numel() <= 8 or int(shape.min()) < 1:
        return "the shape is no list of positive whole numbers"
    sizes = shape.flatten().tolist()
    rows, columns = math.prod(sizes[:-1]), sizes[-1]
    if bits.dtype != torch.uint8 or bits.numel() != rows * -(-columns // 8):
        return f"the bitmask has {bits.numel():,} elements of {bits.dtype}, which is not that of shape {sizes}"
    if values.dtype not in _FLOATS:
        return f"values are {values.dtype}, which is not read here"
    wide = np.unpackbits(bits.numpy().reshape(rows, -1), axis=1, bitorder="little")
    if wide[:, columns:].any():
        return "bits are set behind the last column"
    each = wide.sum(1, dtype=np.int64)
    if values.numel() != int(each.sum()):
        return f"{int(each.sum()):,} bits are set, and there are {values.numel():,} values"
    if layout == "sparse-24-bitmask":
        fours = columns % 4 == 0 and bool((wide[:, :columns].reshape(-1, 4).sum(1) == 2).all())
        return "" if fours else "not two of every four are kept"
    offsets = parts["row_offsets"]
    if offsets.dtype not in (torch.int64, torch.int32) or offsets.numel() != rows:
        return f"there are {offsets.numel():,} row offsets of {offsets.dtype} for {rows:,} rows"
    starts = np.cumsum(each) - each
    return "" if np.array_equal(offsets.flatten().numpy(), starts) else "row offsets disagree with the bits"


def _dense(parts: Mapping[str, Tensor]) -> Tensor:
    sizes = parts["shape"].flatten().tolist()
    rows = math.prod(sizes[:-1])
    bits = parts["bitmask"].numpy().reshape(rows, -1)
    kept = torch.from_numpy(np.unpackbits(bits, axis=1, count=sizes[-1], bitorder="little").astype(bool))
    found = torch.zeros(rows, sizes[-1], dtype=parts["compressed"].dtype)
    found[kept] = parts["compressed"].flatten()
    return found.view(sizes)
