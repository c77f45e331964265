"""A map disappears in the layer before it: the pruned model then speaks the original's space by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.forward import call, undisturbed
from ..core.masks import named_parameters
from ..errors import UsageError
from .maps import Affine

__all__ = ["fold_", "fold_layer_"]

Embed = Callable[[nn.Module, Any], Tensor]


def fold_(model: nn.Module, map: Affine, example: Any, *, embed: Embed | None = None) -> str:
    """Fold a map into the model's last linear layer, and prove on an example that this is the same.

    A linear layer y = W x + b followed by the map is the linear layer (A^T W) x + (A^T b + c). Between that layer and
    the vector only what commutes with every linear map may stand: a mean over tokens, dropout. Behind an activation, a
    norm or a residual connection it is not the same; that is found by running the model, and the model is left as it
    was: store the map beside the checkpoint then.

    Args:
        model: changed in place; its output becomes as wide as the map's.
        map: fitted on what the model gives.
        example: one batch: a tensor, a tuple of arguments or a mapping of named ones.
        embed: `(model, example) -> "rows width"`, what the map was fitted on; the model's own output by default.

    Returns:
        The path of the layer. It is dense afterwards: zeros that pruning made in it are gone, and masks that name it
        no longer hold.

    Raises:
        UsageError: no linear layer, a layer that is used elsewhere too, or one with something non-linear behind it.

    Cost: two forward passes of the example.
    """
    run = embed or _output
    with undisturbed(model):
        path, layer = _last_linear(model, example, run)
        before = run(model, example)
        if before.dim() != 2 or before.shape[1] != map.matrix.shape[0]:
            raise UsageError(
                f"the model gives shape {tuple(before.shape)}, and the map takes one vector of width "
                f"{map.matrix.shape[0]} a row; fold the map that was fitted on this model, or pass embed="
            )
        wanted = map(before.double())
        if layer.out_features != map.matrix.shape[0]:
            raise UsageError(_reason(path, f"it computes {layer.out_features} numbers and not the vector"))
        old = layer.weight, layer.bias, layer.out_features
        fold_layer_(layer, map)
        found = run(model, example).double()
        if found.shape != wanted.shape or not _close(found, wanted, before.dtype):
            layer.weight, layer.bias, layer.out_features = old
            raise UsageError(_reason(path, "something that is not linear stands between it and the vectors"))
    return path


def fold_layer_(layer: nn.Linear, map: Affine) -> nn.Linear:
    """Make a linear layer compute what it computed before and the map behind it; returns the layer.

    Raises:
        UsageError: the layer computes another width than the map takes.
    """
    if layer.out_features != map.matrix.shape[0]:
        raise UsageError(
            f"the layer computes {layer.out_features} numbers and the map takes {map.matrix.shape[0]}; they do not fit"
        )
    old = layer.weight.detach()
    matrix, shift = map.matrix.to(old.device), map.shift.to(old.device)
    bias = shift if layer.bias is None else layer.bias.detach().double() @ matrix + shift
    grads = layer.weight.requires_grad
    layer.weight = nn.Parameter((matrix.T @ old.double()).to(old.dtype), requires_grad=grads)
    layer.bias = nn.Parameter(bias.to(old.dtype), requires_grad=grads)
    layer.out_features = int(matrix.shape[1])
    return layer


def _last_linear(model: nn.Module, example: Any, run: Embed) -> tuple[str, nn.Linear]:
    """The linear layer that computes last, once, and with tensors of its own."""
    order: list[str] = []
    paths = {module: path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_hook(lambda module, args, output: order.append(paths[module]))
        for module in paths
    ]
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        raise UsageError(
            "the model has no linear layer that computes, so no map can be folded into it. Store the map beside the "
            "checkpoint: align.save(map, path)"
        )
    path = order[-1]
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    if order.count(path) > 1:
        raise UsageError(_reason(path, "the model runs it more than once"))
    weight = layer.weight
    names = [name for name, parameter in named_parameters(model).items() if parameter is weight]
    if len(names) > 1:
        raise UsageError(_reason(path, f"its weight is shared by {', '.join(names)}"))
    return path, layer


def _close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to the rounding of one layer in the model's own type."""
    size = wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return bool((found - wanted).abs().max() <= 256 * torch.finfo(dtype).eps * size)


def _reason(path: str, why: str) -> str:
    return (
        f"{path}: the map cannot be folded into this last linear layer: {why}. Store the map beside the checkpoint "
        "instead: align.save(map, path)"
    )


def _output(model: nn.Module, example: Any) -> Tensor:
    """The tensor that the model gives."""
    output = call(model, example)
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the model returned {type(output).__name__}; pass embed=, a function (model, example) -> one vector a row"
        )
    return output
