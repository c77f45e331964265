"""Training that is aware of quantization: weights are rounded in every forward pass, and learn to live with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.masks import Masks
from secateur.core.matrix import Layout
from secateur.core.where import Only
from secateur.deploy.grid import from_grid, on_scale, to_grid
from secateur.deploy.quantize import Scheme, chosen_layers, grid_of, layouts_of
from secateur.errors import NumericError, UsageError

__all__ = ["FakeQuantized", "fake_quantize_"]


class FakeQuantized:
    """A model whose weights are rounded as it computes; made by `fake_quantize_`, ended by `remove()` or a `with`.

    Attributes:
        names: the weights that are rounded, under every name that they have.
    """

    def __init__(self, model: nn.Module, places: dict[str, Layout], rounded: dict[str, Rounded]):
        self._model, self.names = model, tuple(places)
        self._orders: dict[str, list[str]] = {}
        for name, layout in places.items():
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            self._orders[path] = list(module._parameters)
            parametrize.register_parametrization(module, layout.name, rounded[name], unsafe=True)

    def masks(self, masks: Masks) -> Masks:
        """The masks under the names that parameters have meanwhile, for `finetune_` and `hold_`."""
        return Masks({_inside(name) if name in self.names else name: mask for name, mask in masks.items()})

    def remove(self) -> None:
        """Give the model its own weights again, as training left them. Removing twice does nothing."""
        for name in self.names:
            path, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(path)
            if parametrize.is_parametrized(module, attribute):
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        for path, order in self._orders.items():
            module = self._model.get_submodule(path)
            module._parameters = {each: module._parameters[each] for each in order}

    def __enter__(self) -> FakeQuantized:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class Rounded(nn.Module):
    """w -> the nearest weight on the grid; the gradient passes as if nothing were rounded."""

    scale: Tensor

    def __init__(self, layout: Layout, scale: Tensor, bits: int):
        super().__init__()
        self.layout, self.bits = layout, bits
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        return _Straight.apply(weight, self.layout, self.scale, self.bits)


class _Straight(torch.autograd.Function):
    """Rounding forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layout: Layout, scale: Tensor, bits: int) -> Tensor:
        grid = on_scale(layout.to_matrices(weight), scale, bits)
        return layout.from_matrices(from_grid(grid)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None, None


def fake_quantize_(
    model: nn.Module,
    scheme: Scheme = "int8",
    *,
    group: int | None = None,
    outer: Scheme | None = "int8",
    only: Only = None,
    skip: Only = None,
) -> FakeQuantized:
    """Round a model's weights whenever it computes, until told otherwise; train in between, then `quantize_`.

    The scales are those that `quantize_` would choose now, and stay while the weights move; `quantize_` chooses them
    anew. Inputs are not rounded, also where the scheme is int8-dynamic. Zeros stay zero, held by masks as ever:

        with fake_quantize_(model, "int4") as rounded:
            finetune_(model, batches, rounded.masks(masks))
        quantize_(model, "int4")

    Args:
        model: changed in place; its parameters have other names until `remove()`.
        scheme, group, outer, only, skip: as for `quantize_`. torchao is not needed.

    Raises:
        UsageError: what `quantize_` refuses; a weight that is rounded already.
        NumericError: NaN or Inf among the weights.

    Cost: two passes over the weights in every forward pass, and their scales.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks"; Bengio, Leonard, Courville 2013 (the
        gradient passes straight through).

    Example:
        >>> model = nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> with fake_quantize_(model, "int4"):
        ...     rounded = model.weight.detach().clone()
        >>> len(rounded.unique()) <= 15 * 2, torch.equal(model.weight, before)
        (True, True)
    """
    if any(isinstance(module, Rounded) for module in model.modules()):
        raise UsageError("the model's weights are rounded already; remove() that first")
    chosen, _ = chosen_layers(model, scheme, outer, only, skip)
    known = layouts_of(model)
    places: dict[str, Layout] = {}
    rounded: dict[str, Rounded] = {}
    for layer in chosen:
        _, bits, size = grid_of(layer, scheme, outer, group)
        try:
            grid = to_grid(layer.layout.to_matrices(layer.weight.detach()).float(), bits, size)
        except NumericError as error:
            raise NumericError(f"{layer.name}: {error}") from None
        for name in (layer.name, *layer.tied):
            places[name] = known[name]
            rounded[name] = Rounded(known[name], grid.scale, bits)
    return FakeQuantized(model, places, rounded)


def _inside(name: str) -> str:
    path, _, attribute = name.rpartition(".")
    inside = f"parametrizations.{attribute}.original"
    return f"{path}.{inside}" if path else inside
