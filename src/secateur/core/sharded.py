"""Weights that several processes share out among themselves (`fully_shard`): the whole, and one's own part.

A sharded weight is a DTensor. Importing what that is takes time that most programs never need, so it is known by what
it can do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sharded", "local", "same_order", "shard_like", "spread_like", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of the tensor."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The values that this process holds: a sharded tensor's own part, any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All values: a sharded tensor's gathered from all processes, which must all ask; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread_like(weight: Any, values: Tensor) -> Tensor:
    """`values`, which every process has whole, shared out as `weight` is, on its device; nothing is sent."""
    if not is_sharded(weight):
        return values.to(weight.device)
    from torch.distributed.tensor import distribute_tensor

    there = values.to(weight.device_mesh.device_type)
    return distribute_tensor(there, weight.device_mesh, weight.placements, src_data_rank=None)


def shard_like(weight: Tensor, values: Tensor) -> Tensor:
    """This process's part of `values`, cut as `weight` is, on its device."""
    return local(spread_like(weight, values))


def same_order(values: Tensor, mask: Tensor) -> Tensor:
    """The mask in the order of memory of `values`, so that both are walked through alike."""
    if mask.stride() == values.stride():
        return mask
    return torch.empty_like(values, dtype=torch.bool).copy_(mask)
