"""Masked low-rank adapters: a pruned model is trained through few numbers, and merging them keeps every zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.masks import Masks, check_fits, named_parameters, zero_
from secateur.core.matrix import Layout
from secateur.core.where import Layer, Only, layers, select
from secateur.errors import UsageError

__all__ = ["Adapters", "lora_", "merge_"]


@dataclass(frozen=True)
class Adapters:
    """What `lora_` put into a model, for `merge_`.

    Attributes:
        names: the adapted parameters.
        rank: of each adapter.
        size: numbers that are trained, vectors of the model's own included.
        needed_gradient: parameter name, as before -> whether it needed a gradient.
    """

    names: tuple[str, ...]
    rank: int
    size: int
    needed_gradient: dict[str, bool] = field(repr=False)


class _Masked(nn.Module):
    """W -> W + scale * M * (B A), part by part."""

    mask: Tensor | None

    def __init__(self, layout: Layout, weight: Tensor, mask: Tensor | None, rank: int, scale: float):
        super().__init__()
        part, out, columns = layout.shape
        options: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.layout, self.scale = layout, scale
        self.order: list[str] = []  # of the module's parameters, before
        self.a = nn.Parameter(torch.randn(part, rank, columns, **options) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(part, out, rank, **options))
        self.register_buffer("mask", None if mask is None else mask.to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        change = self.layout.from_matrices(self.scale * (self.b @ self.a))
        if self.mask is not None:
            change = change * self.mask
        return (weight + change).to(weight.dtype)


def lora_(
    model: nn.Module,
    masks: Masks | None = None,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    vectors: bool = True,
    only: Only = None,
    skip: Only = None,
    seed: int = 0,
) -> Adapters:
    """Freeze a model and give its layers low-rank adapters that respect the masks: W + (alpha / rank) M (B A).

    Train with `finetune_` or `distill_`, without masks, since nothing that is pruned can move; then `merge_`. Any
    layer whose weight is a matrix can be adapted: linear, convolution, transposed, packed attention, stacked
        experts.

    Args:
        model: changed in place; it computes what it computed before, bit for bit, until it is trained.
        masks: what `prune_` returned; None adapts without masks.
        rank: of B A, at least 1.
        alpha: alpha / rank scales what the adapters add.
        vectors: also train biases and norms, which cost next to nothing and have no zeros to keep.
        only, skip: which layers, as for `prune_`; default the masked ones, or without masks those that `prune_`
            would take.
        seed: of A; B starts at zero.

    Returns:
        What was added, for `merge_`.

    Raises:
        UsageError: a rank below 1, masks of another model, no layer, adapters that are there already, or a tied
            weight.

    Cost: rank (out + in) numbers a layer with their gradients and moments; one addition of the weights' size a
        forward pass.

    Source: Hu et al. 2021; masks on the product as in PERP (Zimmer et al. 2023, "MaskLoRA"), which also trains the
        vectors.

    Example:
        >>> layer = nn.Linear(16, 8)
        >>> masks = Masks({"weight": torch.rand(8, 16) > 0.5})
        >>> adapters = lora_(masks.apply_(layer), masks, rank=2)
        >>> adapters.size  # 2 x (16 + 8) and the bias
        56
        >>> bool((merge_(layer, adapters).weight[~masks["weight"]] == 0).all())
        True
    """
    if rank < 1 or not 0 < alpha < math.inf:
        raise UsageError(
            f"expected a rank of at least 1 and an alpha above 0; got rank={rank}, alpha={alpha:g}"
        )
    chosen = _chosen(model, masks, only, skip)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(vectors and parameter.dim() <= 1 and parameter.is_floating_point())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in chosen:
            mask = None if masks is None else masks.get(layer.name)
            adapter = _Masked(layer.layout, layer.weight, mask, rank, alpha / rank)
            adapter.order = list(layer.module._parameters)
            parametrize.register_parametrization(layer.module, layer.layout.name, adapter)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapters(tuple(layer.name for layer in chosen), rank, size, before)


def merge_(model: nn.Module, adapters: Adapters) -> nn.Module:
    """Add what the adapters learned to the weights and take them out; returns the model.

    The model computes the same, bit for bit, pruned weights are exactly zero, and every parameter has its old name
    and needs a gradient where it did before.

    Raises:
        UsageError: the model has no such adapters.
    """
    places = []
    for name in adapters.names:
        path, _, parameter = name.rpartition(".")
        module = dict(model.named_modules()).get(path)
        inside = getattr(module, "parametrizations", None)
        if (
            module is None
            or inside is None
            or parameter not in inside
            or not isinstance(inside[parameter][0], _Masked)
        ):
            raise UsageError(
                f"{name}: there is no adapter on it; merge_ needs the model and the adapters of one lora_"
            )
        places.append((module, parameter, inside[parameter][0]))
    for module, parameter, adapter in places:
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
        module._parameters = {each: module._parameters[each] for each in adapter.order}
        if adapter.mask is not None:
            zero_(getattr(module, parameter).detach(), adapter.mask)  # no negative zero stays
    for name, each in model.named_parameters():
        each.requires_grad_(adapters.needed_gradient[name])
    return model


def _chosen(model: nn.Module, masks: Masks | None, only: Only, skip: Only) -> list[Layer]:
    if any(isinstance(module, _Masked) for module in model.modules()):
        raise UsageError("the model has adapters already; merge_ them first")
    if masks is None or only is not None or skip is not None:
        chosen = list(select(model, only, skip).chosen)
    else:
        parameters = named_parameters(model)
        for name, mask in masks.items():
            check_fits(name, mask, parameters)
        chosen = [layer for layer in layers(model) if layer.name in masks]
    if not chosen:
        raise UsageError("there is no layer to adapt; give masks, or choose layers with only=")
    for layer in chosen:
        if layer.tied:
            raise UsageError(
                f"{layer.name}: this weight is also {', '.join(layer.tied)}; an adapter on one of them would untie "
                f'them. Skip it with skip="{layer.name}"'
            )
    return chosen
