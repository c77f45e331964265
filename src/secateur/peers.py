"""Dense models as fast as torch makes them: what a packed one has to beat."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dynamic_int8", "prepared"]


class Prepared(nn.Module):
    """A linear layer whose weight oneDNN has laid out for itself, as freezing compilers do."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        with torch.inference_mode(False), torch.no_grad():
            self.held = torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone())
        self.bias = bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self(torch.zeros(2, 3, weight.shape[1], dtype=weight.dtype))  # fails here, or never

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return torch.ops.mkldnn._linear_pointwise(x, self.held, self.bias, "none", [], "")


def prepared(model: nn.Module) -> nn.Module | None:
    """A copy whose linear layers run on weights that oneDNN has laid out; None where this torch cannot."""
    try:
        return _replaced(model, Prepared)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None


def dynamic_int8(model: nn.Module) -> nn.Module | None:
    """A copy whose linear layers hold 8-bit weights and round their inputs, by torch; None where this torch cannot."""

    def plain(weight: Tensor, bias: Tensor | None) -> nn.Module:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight.data = weight.detach().float().contiguous()
        if bias is not None:
            layer.bias.data = bias.detach().float()
        return layer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still the fastest 8-bit product of this torch
            changed = _replaced(copy.deepcopy(model).float(), plain)
            return torch.ao.quantization.quantize_dynamic(changed, {nn.Linear}, inplace=True)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None


def _replaced(model: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        found: Any = module
        if type(found).__name__ == "Conv1D" and path:
            new = make(found.weight.t().contiguous(), found.bias)
        elif type(found) is nn.Linear and path:
            new = make(found.weight, found.bias)
        else:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    return model.eval()
