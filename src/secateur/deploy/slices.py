"""Copies of a model whose tensors are narrower, or the very same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.axes.program import narrow_tensor
from secateur.errors import UsageError

__all__ = ["Index", "copied", "narrow", "refuse_unfit", "shared_copy", "sliced_copy"]

Index = Mapping[str, tuple[Tensor | None, ...]]  # tensor name -> kept positions of each dimension, None for all


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the model's own tensors."""
    return copied(model, {id(tensor): tensor for tensor in _tensors(model).values()})


def sliced_copy(model: nn.Module, index: Index, zeros: Index | None = None) -> nn.Module:
    """A copy of the model in which every tensor has only its kept positions; tied tensors stay tied.

    Args:
        model: Untouched.
        index: Kept positions by tensor name.
        zeros: Positions that hold numbers; parameters are zero elsewhere, before they are sliced.

    Raises:
        UsageError: the model cannot be copied.

    Cost: a copy of what is kept.
    """
    new: dict[int, Any] = {}
    for name, tensor in _tensors(model).items():
        if id(tensor) not in new and (name in index or (zeros or {}).get(name)):
            filled = (zeros or {}).get(name) if isinstance(tensor, nn.Parameter) else None
            new[id(tensor)] = narrow(tensor, index.get(name, ()), filled)
    small = copied(model, new)
    for module in small.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it remembers the tensors of the original
    return small


def narrow(tensor: Tensor, index: Sequence[Tensor | None], zeros: Sequence[Tensor | None] | None = None) -> Any:
    """A tensor's kept positions, as a parameter if it was one, in its memory format, with its attributes."""
    value = tensor.detach()
    if zeros is not None and any(kept is not None for kept in zeros):
        value = value.clone()
        for dim, kept in enumerate(zeros):
            if kept is not None:
                gone = torch.ones(value.shape[dim], dtype=torch.bool)
                gone[kept] = False
                value.index_fill_(dim, gone.nonzero().flatten().to(value.device), 0)
    small = narrow_tensor(value, list(index))
    small = small.clone() if small is value or small.data_ptr() == tensor.data_ptr() else small
    if (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        small = small.contiguous(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        small = nn.Parameter(small, requires_grad=tensor.requires_grad)
    for name, value in vars(tensor).items():
        setattr(small, name, value)
    return small


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, with what the memo says in place of tensors; refused in words where there is none."""
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        words = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{type(model).__name__}: the model cannot be copied ({words}). A tensor that is computed from a "
            "parameter and kept as an attribute does that; nn.utils.prune.remove or its like makes it a parameter."
        ) from error


def refuse_unfit(model: nn.Module) -> None:
    """Refuse by name what slicing would silently lose.

    Raises:
        UsageError: a parameter of a class of its own (quantized, distributed), gradient hooks, no real memory, more
            than one device.
    """
    devices: dict[torch.device, str] = {}
    for name, tensor in _tensors(model).items():
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        (one, first), (other, second) = [*devices.items()][:2]
        raise UsageError(
            f"{first} is on {one} and {second} on {other}: the model lies on {len(devices)} devices, where it cannot "
            "be analysed as a whole. Move it to one, shrink it, and spread it again."
        )
    for name, tensor in _tensors(model).items():
        if type(tensor) not in (nn.Parameter, nn.Buffer, Tensor):
            raise UsageError(
                f"{name}: a {type(tensor).__name__} cannot be sliced; shrink the plain float model first, then "
                "quantize or distribute it."
            )
        if tensor.is_quantized:
            raise UsageError(f"{name}: quantized tensors cannot be sliced; shrink the float model first.")
        if getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise UsageError(f"{name}: its gradient hook would be lost; remove it, shrink, and set it again.")
        if tensor.is_meta:
            raise UsageError(f"{name}: the model has no numbers (meta device); load its weights first.")
