"""A layer whose weight is held as integers: torchao's tensors for linear layers, the same in plain torch for
others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.matrix import Layout
from secateur.core.quiet import quiet
from secateur.deploy.grid import Grid, from_grid
from secateur.errors import UsageError

__all__ = ["Integers", "hold_linear_", "hold_plain_", "import_torchao", "linear_of"]


class Integers(nn.Module):
    """Makes the weight anew from its integers whenever the layer asks for it."""

    scale: Tensor

    def __init__(self, layout: Layout, scale: Tensor, bits: int, dtype: torch.dtype):
        super().__init__()
        self.layout, self.bits, self.dtype = layout, bits, dtype
        self.register_buffer("scale", scale)

    def forward(self, integers: Tensor) -> Tensor:
        """The weight in the layer's own shape and type."""
        return self.layout.from_matrices(from_grid(Grid(integers, self.scale))).to(self.dtype)


def hold_plain_(module: nn.Module, layout: Layout, integers: nn.Parameter, scale: Tensor, bits: int) -> None:
    """Replace a weight by integers from which any layer can make it: convolution, embedding, packed attention,
    experts.

    Tied weights are given the same `integers` and `scale`.
    """
    dtype, order = getattr(module, layout.name).dtype, list(module._parameters)
    module._parameters = {name: integers if name == layout.name else module._parameters[name] for name in order}
    parametrize.register_parametrization(module, layout.name, Integers(layout, scale, bits, dtype), unsafe=True)


def hold_linear_(module: nn.Linear, grid: Grid, bits: int, dynamic: bool) -> None:
    """Replace the weight of a plain linear layer by torchao's tensor around the integers.

    Raises:
        UsageError: torchao is missing.
    """
    module.weight = nn.Parameter(_torchao_weight(grid, bits, dynamic, module.weight.dtype), requires_grad=False)


def _torchao_weight(grid: Grid, bits: int, dynamic: bool, dtype: torch.dtype) -> Tensor:
    """torchao's own tensor around integers that are there already."""
    torchao = import_torchao()
    integers, scale = grid.integers[0], grid.scale[0]
    zero = torch.zeros_like(scale, dtype=torch.int8)
    columns = integers.shape[1] // scale.shape[1]
    if bits == 8 and scale.shape[1] == 1:
        how = torchao["QuantizeTensorToInt8Kwargs"](torchao["PerRow"]()) if dynamic else None
        return torchao["Int8Tensor"](
            integers, scale, [1, columns], dtype, zero_point=zero, act_quant_kwargs=how
        )
    kind = getattr(torch, f"int{bits}")  # torch.int4 is a type that torch names and mypy does not know
    return torchao["IntxUnpackedToInt8Tensor"](integers, scale, zero, kind, (1, columns), dtype, None)


def linear_of(module: nn.Module, layout: Layout) -> nn.Linear:
    """The `nn.Linear` that computes what transformers' `Conv1D` does, its transposed weight put upright."""
    weight = layout.to_matrices(getattr(module, layout.name).detach())[0]
    bias = getattr(module, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear.train(module.training)


def import_torchao() -> dict[str, Any]:
    """The parts of torchao that are used; what it says while it is imported is kept quiet.

    Raises:
        UsageError: it is missing, or of a version that has other names.
    """
    with quiet():
        try:
            from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
            from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
        except ImportError as error:
            raise UsageError(
                f"quantized linear layers need torchao 0.18 ({error}): pip install 'secateur[quantize]'"
            ) from error
    return {
        "Int8Tensor": Int8Tensor,
        "IntxUnpackedToInt8Tensor": IntxUnpackedToInt8Tensor,
        "PerRow": PerRow,
        "QuantizeTensorToInt8Kwargs": QuantizeTensorToInt8Kwargs,
    }
