"""One `(part, out, in)` view of every layer whose weight multiplies an input; the only place that knows layouts.

`out` counts computed rows, `in` counts multiplied columns. `part` is 1 for almost everything; it is the
group of a grouped convolution, q/k/v of `nn.MultiheadAttention.in_proj_weight` and the expert of a stacked
mixture-of-experts tensor: matrices that share a parameter but not their input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

__all__ = ["Layout", "layouts"]

Rows = Callable[[tuple, dict, "Tensor | None"], "list[Tensor]"]


@dataclass(frozen=True)
class Layout:
    """How one parameter of a module is seen as matrices.

    Attributes:
        name: the parameter's name inside its module, e.g. `weight`.
        shape: `(part, out, in)`.
        to_matrices: parameter-shaped tensor -> `(part, out, in)`; a view where the layout allows.
        from_matrices: the inverse, parameter-shaped.
        rows: `(args, kwargs, real)` of a forward call -> for each part the `(token, in)` inputs that meet
            it, padding left out; `real` is a boolean tensor over the input's leading (for a convolution:
            batch and spatial) positions, or None when all are real. None itself where a module has no input
            activations (an embedding looks rows up).
        bias: the name inside its module of the constants added to the rows, `(part, out)` when reshaped; None
            without any.
    """

    name: str
    shape: tuple[int, int, int]
    to_matrices: Callable[[Tensor], Tensor]
    from_matrices: Callable[[Tensor], Tensor]
    rows: Rows | None
    bias: str | None = None


def layouts(module: nn.Module) -> tuple[Layout, ...]:
    """The matrices that this very module owns (not its children); empty when it owns none.

    Linear, Conv1d/2d/3d, transformers' `Conv1D` (stored transposed), Embedding, `nn.MultiheadAttention`
    (its packed `in_proj_weight`) and transformers' stacked experts are known.

    Example:
        >>> [layout.shape for layout in layouts(nn.Conv2d(8, 6, 3, groups=2))]
        [(2, 3, 36)]
    """
    if isinstance(module, nn.Linear):
        return (_linear(module),)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (_convolution(module),)
    if isinstance(module, nn.Embedding):
        return (_stacked("weight", module.weight, rows=None),)
    if isinstance(module, nn.MultiheadAttention):
        return (_packed_attention(module),) if module.in_proj_weight is not None else ()
    # transformers' Conv1D, known by name and shape so that transformers need not be imported
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and _is_matrix(module, "weight"):
        return (_transposed(module),)
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and _is_matrix(module, "down_proj", 3):
        return _experts(module)
    return ()


def _is_matrix(module: nn.Module, name: str, dim: int = 2) -> bool:
    parameter = getattr(module, name, None)
    return isinstance(parameter, nn.Parameter) and parameter.dim() == dim


def _stacked(name: str, weight: Tensor, rows: Rows | None, bias: str | None = None) -> Layout:
    """A parameter stored `(out, in)`, or `(part, out, in)`."""
    shape = weight.shape if weight.dim() == 3 else (1, *weight.shape)
    part, out, columns = shape
    return Layout(
        name,
        (part, out, columns),
        lambda tensor: tensor.reshape(part, out, columns),
        lambda matrices: matrices.reshape(weight.shape),
        rows,
        bias,
    )


def _bias(module: nn.Module, name: str = "bias") -> str | None:
    """The name of a bias that is really there."""
    return name if isinstance(getattr(module, name, None), nn.Parameter) else None


def _linear(module: nn.Linear) -> Layout:
    def rows(args: tuple, kwargs: dict, real: Tensor | None) -> list[Tensor]:
        return [_real_rows(_first(args, kwargs), real)]

    return _stacked("weight", module.weight, rows, _bias(module))


def _transposed(module: Any) -> Layout:
    """transformers' Conv1D keeps `(in, out)`."""
    columns, out = module.weight.shape

    def rows(args: tuple, kwargs: dict, real: Tensor | None) -> list[Tensor]:
        return [_real_rows(_first(args, kwargs), real)]

    return Layout(
        "weight",
        (1, out, columns),
        lambda tensor: tensor.t()[None],
        lambda matrices: matrices[0].t().contiguous(),
        rows,
        _bias(module),
    )


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Layout:
    """Grouped convolution as one matrix a group: `(groups, out / groups, in / groups * kernel)`."""
    groups = module.groups
    out, columns = module.out_channels // groups, module.weight[0].numel()
    stored = module.weight.shape

    def rows(args: tuple, kwargs: dict, real: Tensor | None) -> list[Tensor]:
        inputs = _first(args, kwargs)
        if inputs.dim() == len(stored) - 1:
            inputs = inputs[None]
        patches = _patches(module, inputs)
        if real is not None:  # an output position is real when the input it starts at is
            for axis, stride in enumerate(module.stride):
                places = torch.arange(patches.shape[2 + axis], device=real.device) * stride
                real = real.index_select(1 + axis, places.clamp(max=real.shape[1 + axis] - 1))
        return [_real_rows(part, real) for part in patches]

    return Layout(
        "weight",
        (groups, out, columns),
        lambda tensor: tensor.reshape(groups, out, columns),
        lambda matrices: matrices.reshape(stored),
        rows,
        _bias(module),
    )


def _patches(
    module: Any, inputs: Float[Tensor, "batch channel *space"]
) -> Float[Tensor, "part batch *place in"]:
    """The receptive field of every output position: im2col for any number of dimensions."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(sizes):
        windows = windows.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    batch, channels = inputs.shape[:2]
    place = windows.shape[2 : inputs.dim()]
    windows = windows.reshape(batch, module.groups, channels // module.groups, *place, *module.kernel_size)
    # (batch, part, channel, *place, *kernel) -> (part, batch, *place, channel, *kernel)
    space = len(place)
    order = [1, 0, *range(3, 3 + space), 2, *range(3 + space, 3 + 2 * space)]
    return windows.permute(order).flatten(2 + space)


def _packed_attention(module: nn.MultiheadAttention) -> Layout:
    """`in_proj_weight` stacks the projections of query, key and value; each has its own input."""
    size = module.embed_dim

    def rows(args: tuple, kwargs: dict, real: Tensor | None) -> list[Tensor]:
        names = ("query", "key", "value")
        inputs = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
        return [_real_rows(tensor, real) for tensor in inputs]

    return Layout(
        "in_proj_weight",
        (3, size, size),
        lambda tensor: tensor.reshape(3, size, size),
        lambda matrices: matrices.reshape(3 * size, size),
        rows,
        _bias(module, "in_proj_bias"),
    )


def _experts(module: Any) -> tuple[Layout, ...]:
    """transformers' experts: 3-D tensors, `(expert, out, in)` or, `is_transposed`, `(expert, in, out)`."""
    first = "gate_up_proj" if _is_matrix(module, "gate_up_proj", 3) else "up_proj"
    if not _is_matrix(module, first, 3):
        return ()

    def routed(args: tuple, kwargs: dict, real: Tensor | None) -> list[Tensor]:
        hidden = args[0] if args else kwargs["hidden_states"]
        chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
        hidden, chosen = hidden.reshape(-1, hidden.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        if real is not None:
            hidden, chosen = hidden[real.reshape(-1)], chosen[real.reshape(-1)]
        return [hidden[(chosen == expert).any(-1)] for expert in range(getattr(module, first).shape[0])]

    def inner(args: tuple, kwargs: dict, real: Tensor | None) -> list[Tensor]:
        return [_expert_inner(module, first, e, rows) for e, rows in enumerate(routed(args, kwargs, real))]

    return (_expert_layout(module, first, routed), _expert_layout(module, "down_proj", inner))


def _expert_inner(module: Any, first: str, expert: int, rows: Float[Tensor, "token in"]) -> Tensor:
    """What `down_proj` of one expert multiplies, computed as the module's own forward computes it."""
    weight = getattr(module, first)[expert]
    up = rows @ (weight if module.is_transposed else weight.t())
    if module.has_bias:
        up = up + getattr(module, f"{first}_bias")[expert]
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def _expert_layout(module: Any, name: str, rows: Rows) -> Layout:
    weight, bias = getattr(module, name), _bias(module, f"{name}_bias")
    if not module.is_transposed:
        return _stacked(name, weight, rows, bias)
    part, columns, out = weight.shape
    return Layout(
        name,
        (part, out, columns),
        lambda tensor: tensor.transpose(1, 2),
        lambda matrices: matrices.transpose(1, 2).contiguous(),
        rows,
        bias,
    )


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _real_rows(inputs: Shaped[Tensor, "... in"], real: Tensor | None) -> Shaped[Tensor, "token in"]:
    """All leading positions as rows, without those that `real` calls padding."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat if real is None else flat[real.reshape(-1)]
