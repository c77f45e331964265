"""Processes that train one model together must prune the same weights."""

from __future__ import annotations

import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.core.sharded import is_sharded

__all__ = ["agreed"]


def agreed(masks: Masks, model: nn.Module) -> Masks:
    """The first process's masks, where several processes train this model and may have scored with other data.

    Scores that look at the weights alone are the same everywhere and need no agreement.
    """
    shared = isinstance(model, nn.parallel.DistributedDataParallel) or any(map(is_sharded, model.parameters()))
    if not shared:
        return masks
    found = {}
    for name, mask in masks.items():
        said = mask.to(torch.uint8)
        torch.distributed.broadcast(said, src=0)
        found[name] = said.bool()
    return Masks(found, masks.originals)
