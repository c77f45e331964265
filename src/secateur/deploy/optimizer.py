"""A training run goes on with the shrunk model: the optimizer's state and averages are sliced alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.masks import named_parameters
from secateur.deploy.shrunk import shrunk
from secateur.deploy.slices import Index, narrow
from secateur.errors import UsageError

__all__ = ["slice_like_", "slice_optimizer_"]


def slice_optimizer_(optimizer: Optimizer, model: nn.Module, small: nn.Module) -> Optimizer:
    """Let an optimizer of the model go on with the shrunk model's parameters; returns the optimizer.

    Every state tensor in the shape of its parameter (Adam's moments, momentum, running averages) keeps the
    positions that the parameter keeps. Step counts and the groups' settings stay.

    Args:
        optimizer: Over parameters of `model`; changed in place.
        model: The model that was shrunk; untouched.
        small: What `shrink` made of it.

    Raises:
        UsageError: parameters of another model, or a state that no positions can be told from; nothing is changed.

    Cost:
        A copy of what is kept of the state.
    """
    index = shrunk(small).index
    names = {id(parameter): name for name, parameter in reversed(list(named_parameters(model).items()))}
    new = named_parameters(small)
    moved: dict[int, nn.Parameter] = {}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None or name not in new:
                raise UsageError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is none of "
                    f"{type(model).__name__}'s; give the model that it trains."
                )
            moved[id(parameter)] = new[name]
            state = optimizer.state.get(parameter, {})
            states[new[name]] = {
                key: _sliced(name, key, value, parameter, index) for key, value in state.items()
            }
    for group in optimizer.param_groups:
        group["params"] = [moved[id(parameter)] for parameter in group["params"]]
    optimizer.state.clear()
    optimizer.state.update({parameter: state for parameter, state in states.items() if state})
    return optimizer


def _sliced(name: str, key: str, value: Any, parameter: Tensor, index: Index) -> Any:
    if name not in index or not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    if value.shape != parameter.shape:
        raise UsageError(
            f"{name}: the optimizer's {key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}; "
            "only states in the shape of their parameters can be sliced. Start a new optimizer for the small model."
        )
    return narrow(value, index[name])


@torch.no_grad()
def slice_like_(small: nn.Module, other: nn.Module) -> nn.Module:
    """Put another model's kept numbers into a shrunk one, such as a moving average of the weights; returns it.

    Args:
        small: A copy of what `shrink` made; changed in place.
        other: A model with the names and shapes of the one that was shrunk.

    Raises:
        UsageError: names or shapes differ; nothing is changed.
    """
    index = shrunk(small).index
    given = {**named_parameters(other), **dict(other.named_buffers(remove_duplicate=False))}
    wanted = {**named_parameters(small), **dict(small.named_buffers(remove_duplicate=False))}
    found = {}
    for name, target in wanted.items():
        if name not in given:
            raise UsageError(f"{name}: {type(other).__name__} has no tensor of that name; it is another model.")
        kept = index.get(name, ())
        source = given[name]
        positions = [*kept, *[None] * (source.dim() - len(kept))]
        shape = tuple(n if p is None else len(p) for n, p in zip(source.shape, positions, strict=True))
        if shape != tuple(target.shape):
            raise UsageError(
                f"{name}: {shape} would be kept, expected {tuple(target.shape)}; it is another model."
            )
        found[name] = narrow(source.detach(), kept)
    for name, target in wanted.items():
        target.copy_(found[name])
    return small
