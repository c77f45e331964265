"""Run a model as if its parameters were masked: nothing is copied, nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Masking"]


class Masking(TorchFunctionMode):
    """Every torch function sees zeros in place of removed units of the parameters.

    Args:
        model: Whose parameters.
        index: Parameter name -> kept positions of each dimension, None where all stay.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> with Masking(layer, {"weight": (torch.tensor([1]), None)}):
        ...     print(float(layer(torch.ones(1, 2)).detach()[0, 0]))
        0.0
    """

    def __init__(self, model: nn.Module, index: Mapping[str, Sequence[Tensor | None]]) -> None:
        super().__init__()
        named = model.named_parameters(remove_duplicate=False)
        self.index = {id(tensor): index[name] for name, tensor in named if name in index}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._masked(args), **self._masked(kwargs or {}))

    def _masked(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _zeroed(value, self.index[id(value)]) if id(value) in self.index else value
        if type(value) in (tuple, list):
            return type(value)(self._masked(part) for part in value)
        if type(value) is dict:
            return {key: self._masked(part) for key, part in value.items()}
        return value


def _zeroed(value: Tensor, index: Sequence[Tensor | None]) -> Tensor:
    with torch._C.DisableTorchFunction():
        out = value.detach().clone()
        for dim, kept in enumerate(index):
            if kept is not None:
                gone = torch.ones(value.shape[dim], dtype=torch.bool)
                gone[kept.cpu()] = False
                out.index_fill_(dim, gone.nonzero().flatten().to(out.device), 0)
    return out
