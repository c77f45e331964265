"""A module's state as tensors in one file: tied ones once, parts of one memory apart, nothing but numbers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.stored import save_tensors
from secateur.errors import UsageError

__all__ = ["groups", "plain_state", "save_state"]


def save_state(
    model: nn.Module, path: Path, dtype: torch.dtype | None, more: Mapping[str, Tensor] | None = None
) -> None:
    """Write the state with every tied tensor once; the same state gives the same bytes.

    Args:
        model: Whose state.
        path: The safetensors file.
        dtype: In which floating-point tensors of the state are stored; None keeps theirs.
        more: Further tensors, in their own types.

    Raises:
        UsageError: the state holds something that is no plain tensor.
    """
    state = {**plain_state(model), **(more or {})}
    same = groups(state)
    views = Counter(state[kept].untyped_storage().data_ptr() for kept, *_ in same)
    tensors, tied = {}, {}
    for kept, *aliases in same:
        tied.update(dict.fromkeys(aliases, kept))
        tensor = state[kept].detach()
        if views[tensor.untyped_storage().data_ptr()] > 1:
            tensor = tensor.clone()  # parts of one memory that are not the same tensor are stored apart
        if dtype is not None and tensor.is_floating_point() and kept not in (more or {}):
            tensor = tensor.to(dtype)
        tensors[kept] = tensor.cpu().contiguous()
    # One entry only: safetensors writes several in an order that changes from process to process.
    save_tensors(path, tensors, {"tied": json.dumps(tied, sort_keys=True)} if tied else {"format": "pt"})


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state, if it is made of dense tensors with values.

    Raises:
        UsageError: it holds something else, by name.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"{name} in the model's state is {type(tensor).__name__}; only tensors can be stored."
            )
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise UsageError(f"{name} has no shape yet; run one forward pass before the model is returned.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UsageError(f"{name} is no dense tensor with values ({tensor.layout}, {tensor.device}).")
    return state


def groups(state: dict[str, Tensor]) -> list[list[str]]:
    """Names that stand for one and the same tensor, together; in the order of the state."""
    found: dict[object, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        found[place if tensor.numel() else name].append(name)
    return list(found.values())
