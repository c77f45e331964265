"""Quantization after pruning: weights become small integers, zeros stay exactly zero, and that is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core.matrix import Layout, layouts
from secateur.core.where import Layer, Only, select
from secateur.deploy.grid import Grid, divided, from_grid, to_grid
from secateur.deploy.integers import Integers, hold_linear_, hold_plain_, import_torchao, linear_of
from secateur.errors import NumericError, UsageError, nearest

__all__ = [
    "SCHEMES",
    "Quantized",
    "QuantizedLayer",
    "Scheme",
    "chosen_layers",
    "find_integers",
    "grid_of",
    "install_",
    "layouts_of",
    "put_",
    "quantize_",
]

Scheme = Literal["int8", "int4", "int8-dynamic"]

SCHEMES: dict[str, tuple[int, bool]] = {"int8": (8, False), "int4": (4, False), "int8-dynamic": (8, True)}
"""What a scheme is called, its bits a weight, and whether linear layers compute in integers as well."""

OUTER = ("embedding", "head")
GROUP = 32


@dataclass(frozen=True)
class QuantizedLayer:
    """One weight that is held as integers.

    Attributes:
        name: of the parameter, as it was.
        scheme: int8, int4 or int8-dynamic.
        group: columns that share a scale; None for whole rows.
        zeros: integers that are zero, those rounded to zero included.
        size: number of weights.
        error: squared rounding error as a fraction of the weights' square.
    """

    name: str
    scheme: str
    group: int | None
    zeros: int
    size: int
    error: float


@dataclass(frozen=True)
class Quantized:
    """What `quantize_` did.

    Attributes:
        layers: every weight that is integers now.
        left_out: layers that are not, each with the reason.
        rounded_to_zero: weights that were not zero before and are now.
    """

    layers: tuple[QuantizedLayer, ...]
    left_out: tuple[tuple[str, str], ...]
    rounded_to_zero: int

    @property
    def sparsity(self) -> float:
        """Zeros among the integers."""
        return sum(layer.zeros for layer in self.layers) / max(1, sum(layer.size for layer in self.layers))

    def __str__(self) -> str:
        schemes = sorted({layer.scheme for layer in self.layers})
        return (
            f"{len(self.layers)} weights as {', '.join(schemes)}, {self.sparsity:.2%} of the integers zero, "
            f"{self.rounded_to_zero:,} of them by rounding"
        )


@torch.no_grad()
def quantize_(
    model: nn.Module,
    scheme: Scheme = "int8",
    *,
    group: int | None = None,
    outer: Scheme | None = "int8",
    only: Only = None,
    skip: Only = None,
) -> Quantized:
    """Turn a model's weights into integers, in place; prune first, since masks do not apply to integers.

    Every layer that `prune_` knows can be quantized. Scales are symmetric, so zero is an integer and every pruned
    weight stays exactly zero, which is verified.

    Args:
        model: for inference afterwards; linear layers hold torchao's tensors, transformers' `Conv1D` becomes the
            `nn.Linear` that computes the same.
        scheme: int8 or int4 weights that are multiplied in floating point, or "int8-dynamic": linear layers
            quantize their inputs too, token by token, and compute in integers; other layers are int8 then.
        group: columns that share a scale; default whole rows for int8 and 32 for int4. Where it does not divide
            the columns, the largest divisor below it.
        outer: scheme of embeddings and vocabulary heads, which suffer most from few bits; None leaves them alone.
        only, skip: which layers, as for `prune_`; default all but routers.

    Returns:
        What was quantized, what was left, and the zeros.

    Raises:
        UsageError: an unknown scheme, nothing to quantize, a weight that is quantized already, half of a tied
            pair, or torchao is missing.
        NumericError: NaN or Inf among the weights.

    Cost: nine passes over the weights; memory of the model and one layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> model[0].weight.data[0] = 0
        >>> done = quantize_(model)
        >>> str(done).split(",")[0], bool((model[0].weight[0] == 0).all())
        ('1 weights as int8', True)
    """
    chosen, left_out = chosen_layers(model, scheme, outer, only, skip)
    if any(_is_linear(layer.module, layer.tied) for layer in chosen):
        import_torchao()
    plan: list[tuple[Layer, str, Grid]] = []
    found: list[QuantizedLayer] = []
    lost = 0
    for layer in chosen:
        kind, bits, size = grid_of(layer, scheme, outer, group)
        matrices = layer.layout.to_matrices(layer.weight.detach()).float()
        try:
            grid = to_grid(matrices, bits, size)
        except NumericError as error:
            raise NumericError(f"{layer.name}: {error}") from None
        zeros = grid.integers == 0
        _check_zeros(layer.name, matrices, zeros)
        lost_share = (from_grid(grid) - matrices).square().sum() / matrices.square().sum().clamp(min=1e-30)
        found.append(QuantizedLayer(layer.name, kind, size, int(zeros.sum()), layer.size, float(lost_share)))
        plan.append((layer, kind, grid))
        lost += int((zeros & (matrices != 0)).sum())
    places = layouts_of(model)
    for layer, kind, grid in plan:
        install_(model, {name: places[name] for name in (layer.name, *layer.tied)}, kind, grid)
    return Quantized(tuple(found), tuple((layer.name, reason) for layer, reason in left_out), lost)


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """Full parameter name -> layout, of every matrix under every name it has."""
    return {
        f"{path}.{layout.name}" if path else layout.name: layout
        for path, module in model.named_modules()
        for layout in layouts(module)
    }


def install_(model: nn.Module, places: Mapping[str, Layout], scheme: str, grid: Grid) -> None:
    """Hold one weight as integers; a linear layer's own becomes torchao's tensor.

    Args:
        model: changed in place.
        places: every name of the weight -> its layout there, found before the first weight was replaced.
        scheme: of `SCHEMES`.
        grid: integers and scales.
    """
    bits, dynamic = SCHEMES[scheme]
    integers = nn.Parameter(grid.integers, requires_grad=False)
    for name, layout in places.items():
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if _is_linear(module, tuple(places)[1:]):
            if type(module) is not nn.Linear:
                module = put_(model, path, linear_of(module, layout))
            hold_linear_(module, grid, bits, dynamic)
        else:
            hold_plain_(module, layout, integers, grid.scale, bits)


def find_integers(model: nn.Module) -> Iterator[tuple[str, str, Grid, nn.Parameter]]:
    """Every weight that is held as integers: its name, its scheme, integers and scales, and what tied ones
    share."""
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        for attribute, held in dict(getattr(module, "parametrizations", {})).items():
            if isinstance(held[0], Integers):
                grid = Grid(held.original.detach(), held[0].scale)
                yield f"{start}{attribute}", f"int{held[0].bits}", grid, held.original
        weight = module._parameters.get("weight")
        if weight is not None and hasattr(weight, "qdata"):
            grid = Grid(weight.qdata.detach()[None], weight.scale.detach()[None])
            scheme = "int4" if str(getattr(weight, "target_dtype", "")) == "torch.int4" else "int8"
            dynamic = getattr(weight, "act_quant_kwargs", None) is not None
            yield f"{start}weight", "int8-dynamic" if dynamic else scheme, grid, weight


def put_(model: nn.Module, path: str, module: nn.Module) -> Any:
    """Put a module in the place of the one at `path`; returns it."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return module


def _is_linear(module: nn.Module, tied: Sequence[str]) -> bool:
    """Whether torchao's tensors can stand in for the weight: a plain linear layer's, and nobody else's."""
    return not tied and (type(module) is nn.Linear or type(module).__name__ == "Conv1D")


def grid_of(layer: Layer, scheme: str, outer: str | None, group: int | None) -> tuple[str, int, int | None]:
    """Scheme, bits and columns that share a scale, of one layer under the arguments of `quantize_`."""
    kind = str(outer) if layer.role in OUTER else scheme
    if kind == "int8-dynamic" and not _is_linear(layer.module, layer.tied):
        kind = "int8"
    bits = SCHEMES[kind][0]
    return kind, bits, divided(layer.layout.shape[2], group if group is not None or bits == 8 else GROUP)


def chosen_layers(
    model: nn.Module, scheme: str, outer: str | None, only: Only, skip: Only
) -> tuple[list[Layer], list[tuple[Layer, str]]]:
    """The layers that `quantize_` with these arguments would quantize, and those that it would not, with reasons.

    Raises:
        UsageError: an unknown scheme, nothing to quantize, or integers already.
    """
    for given in (scheme, outer):
        if given is not None and given not in SCHEMES:
            raise UsageError(f"scheme {given!r} is not known; {nearest(str(given), SCHEMES)}")
    if any(True for _ in find_integers(model)):
        raise UsageError("the model holds integers already; quantize it once, from its floating-point weights")
    selection = select(model, only or _any, skip)
    reasons = {} if only else {"router": "a router is small, and decides much"}
    reasons |= dict.fromkeys(OUTER, "outer=None") if outer is None else {}
    chosen = [layer for layer in selection.chosen if layer.role not in reasons]
    left_out = list(selection.left_out)
    left_out += [(layer, reasons[layer.role]) for layer in selection.chosen if layer.role in reasons]
    if not chosen:
        raise UsageError("there is no layer to quantize; choose some with only=, or give outer= a scheme")
    return chosen, left_out


def _any(path: str, module: nn.Module) -> bool:
    return True


def _check_zeros(name: str, matrices: Tensor, zeros: Tensor) -> None:
    """Symmetric scales promise it; a promise that is checked."""
    broken = int((~zeros & (matrices == 0)).sum())
    if broken:
        raise NumericError(f"{name}: {broken:,} zeros would not stay zero; this is a defect of secateur")
