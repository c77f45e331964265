"""A shrunk model at the sizes it had before, zeros where something was taken out: it loads where the whole one did."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.deploy.shrunk import shrunk
from secateur.deploy.slots import ATTRIBUTE
from secateur.deploy.twin import built_empty
from secateur.errors import UsageError

__all__ = ["padded"]


def padded(model: nn.Module) -> nn.Module:
    """The model at its whole size, as its class and config build it: the same function, nothing smaller.

    Args:
        model: what `shrink` made of a model of transformers; untouched.

    Raises:
        UsageError: a norm or mean runs over what was taken out, so that zeros are not the same; no config.

    Cost: memory for the whole model.
    """
    note = shrunk(model)
    name = type(model).__name__
    if note.config is None:
        raise UsageError(
            f"{name}: its whole size is known to your own code alone; masks.apply_(model) on the model you shrank puts "
            'the zeros in. Or save with to="compact".'
        )
    if inexact := [axis for axis in note.axes if not axis.exact]:
        raise UsageError(
            f"{name}: {inexact[0].name}: {inexact[0].reason}, so that zeros in its place compute something else. Save "
            'with to="compact".'
        )
    own: Any = model
    whole: Any = built_empty(
        type(model), type(own.config).from_dict(copy.deepcopy(dict(note.config))), buffers=True
    )
    small = {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict(keep_vars=True)}
    made: dict[int, Any] = {}
    for module_path, module in whole.named_modules():
        for table in (module._parameters, module._buffers):
            for last, old in table.items():
                full = f"{module_path}.{last}" if module_path else last
                if old is None or full not in small:  # buffers in no file are as the config makes them
                    continue
                key = id(small[full])
                if key not in made:
                    made[key] = _grown(small[full], tuple(old.shape), note.index.get(full, ()))
                table[last] = made[key]
    if getattr(model, "generation_config", None) is not None:
        whole.generation_config = copy.deepcopy(own.generation_config)
    whole.to(next(model.parameters()).device)
    vars(whole).pop(ATTRIBUTE, None)
    return whole.train(model.training)


def _grown(value: Tensor, shape: tuple[int, ...], index: Sequence[Tensor | None]) -> Any:
    """A tensor at its old size: zeros in a parameter's place of what is gone, ones in a buffer's."""
    if not any(kept is not None for kept in index):
        return value
    trained = isinstance(value, nn.Parameter)
    held = value.detach()
    for dim in reversed(range(held.dim())):
        kept = index[dim]
        if kept is not None:
            size = [*held.shape]
            size[dim] = shape[dim]
            # one, because a variance of zero or a division by zero would not be finite
            wider = torch.zeros(size, dtype=held.dtype) if trained else torch.ones(size, dtype=held.dtype)
            held = wider.to(held.device).index_copy(dim, kept.to(held.device), held)
    return nn.Parameter(held, requires_grad=value.requires_grad) if trained else held
