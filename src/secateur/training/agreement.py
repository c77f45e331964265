"""Processes that train one model together must prune the same weights."""

from __future__ import annotations

import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.core.sharded import is_sharded

__all__ = ["agreed", "together"]


def together(model: nn.Module) -> bool:
    """Whether several processes train this model: each a copy, or each a part."""
    return isinstance(model, nn.parallel.DistributedDataParallel) or any(map(is_sharded, model.parameters()))


def agreed(masks: Masks, model: nn.Module) -> Masks:
    """The first process's masks, where several processes train this model and may have scored with other data.

    Masks that were applied already have to be undone before: what only one process prunes would stay zero there and
    nowhere else. Scores that look at the weights alone are the same everywhere and need no agreement.
    """
    if not together(model):
        return masks
    found = {}
    for name, mask in masks.items():
        said = mask.to(torch.uint8)
        torch.distributed.broadcast(said, src=0)
        found[name] = said.bool()
    return Masks(found)
