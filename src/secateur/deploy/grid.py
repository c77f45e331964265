"""Weights rounded to a grid of few integers, symmetric about zero: what is zero stays exactly zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core import native
from secateur.errors import NumericError, UsageError

__all__ = ["BITS", "Grid", "divided", "from_grid", "on_scale", "to_grid"]

BITS = (4, 8)
# Scales tried, as fractions of the one that reaches the largest weight: with few levels it pays to clip it.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_HALF = (6.2e-5, 65504.0)  # float16's normal numbers


class Grid(NamedTuple):
    """Integers and what they are multiplied by.

    Attributes:
        integers: "part out in", int8, in [-2^(bits-1), 2^(bits-1) - 1].
        scale: "part out groups", float32; a group is a run of in / groups columns.
    """

    integers: Tensor
    scale: Tensor


def to_grid(matrices: Tensor, bits: int, group: int | None = None) -> Grid:
    """Round matrices: w to s * round(w / s), with the s of each row, or group of columns of a row, that errs
    least.

    The scale is one of nine fractions of that which reaches the group's largest weight, so the squared error is
    never above plain rounding's. It is itself rounded to float16 where that holds it, so that it can be stored
    so.

    Args:
        matrices: "part out in".
        bits: 4 or 8.
        group: columns that share a scale; it must divide them; None for whole rows.

    Raises:
        NumericError: NaN or Inf among the weights.

    Cost: nine scales for each weight, which the native kernels try in the nearest cache, and torch in a pass over all
        weights for each.

    Example:
        >>> grid = to_grid(torch.tensor([[[0.0, 1.0, -0.5]]]), 8)
        >>> grid.integers.tolist()
        [[[0, 127, -64]]]
    """
    part, out, columns = matrices.shape
    rows = matrices.detach().float().reshape(-1, group or columns)
    largest = 2.0 ** (bits - 1) - 1
    reach = rows.abs().amax(-1, keepdim=True) / largest
    if not bool(reach.isfinite().all()):
        raise NumericError("NaN or Inf among the weights; they cannot be rounded to integers")
    tried = _storable(reach * torch.tensor(CLIPS, device=reach.device))
    if native.serves(rows):
        integers, scale = native.grid(rows, tried, largest)
        return Grid(integers.reshape(part, out, columns), scale.reshape(part, out, -1))
    best, scale = torch.full_like(reach, torch.inf, dtype=torch.float64), torch.ones_like(reach)
    for each in tried.split(1, 1):
        error = (_rounded(rows, each, largest) * each - rows).square().sum(-1, True, dtype=torch.float64)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, each, scale)
    return on_scale(matrices, scale.reshape(part, out, -1), bits)


def on_scale(matrices: Tensor, scale: Tensor, bits: int) -> Grid:
    """Round matrices with scales that are given; what lies beyond the largest integer is clipped.

    Args:
        matrices: "part out in".
        scale: "part out groups", above zero.
        bits: 4 or 8.
    """
    part, out, columns = matrices.shape
    rows = matrices.detach().float().reshape(part, out, scale.shape[-1], -1)
    integers = _rounded(rows, scale.unsqueeze(-1), 2.0 ** (bits - 1) - 1).to(torch.int8)
    return Grid(integers.reshape(part, out, columns), scale)


def from_grid(grid: Grid) -> Tensor:
    """The weights that the integers stand for, "part out in", float32."""
    part, out, columns = grid.integers.shape
    groups = grid.scale.shape[-1]
    rows = grid.integers.float().reshape(part, out, groups, columns // groups)
    return (rows * grid.scale.unsqueeze(-1)).reshape(part, out, columns)


def divided(columns: int, group: int | None) -> int | None:
    """The largest divisor of the columns that is at most `group`; None, whole rows, where none is half of it.

    Example:
        >>> divided(768, 32), divided(144, 32), divided(27, 32), divided(31, 16), divided(768, None)
        (32, 24, 27, None, None)
    """
    if group is None or columns <= group:
        return None if group is None else columns
    if group < 1:
        raise UsageError(f"group is {group}; expected at least 1, or None for whole rows")
    found = max(size for size in range(1, group + 1) if columns % size == 0)
    return found if 2 * found >= group else None


def _rounded(rows: Tensor, scale: Tensor, largest: float) -> Tensor:
    return (rows / scale).round_().clamp_(-largest, largest)


def _storable(scale: Tensor) -> Tensor:
    """Rounded to float16 where it stays accurate; 1 where a whole group is zero."""
    half = scale.half().float()
    kept = torch.where((scale >= _HALF[0]) & (scale <= _HALF[1]), half, scale)
    return torch.where(scale == 0, torch.ones_like(scale), kept)
