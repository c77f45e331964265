"""Running a model so that it does not notice: no gradients, no dropout, no trace left behind."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.misfit import run
from secateur.errors import UsageError

__all__ = [
    "accepts",
    "batch_size_of",
    "call",
    "device_of",
    "dtype_of",
    "input_of",
    "logits_of",
    "move",
    "uncompiled",
    "undisturbed",
    "unwrapped",
]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random generators are put back.

    Each module's own `training` flag is restored, since a frozen batch norm inside a training model must
    stay frozen. `torch.inference_mode` is not used: a buffer the model fills meanwhile could never again
    take part in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run as they are written: a compiler would miss hooks, or trip over them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel and `torch.compile`."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lies; the CPU for a model that has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> str:
    """The floating-point format of the model's first such parameter, for instance `float32`."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return "none"


def move(example: Any, device: torch.device) -> Any:
    """`example` with every tensor in it on `device`; tuples, lists and mappings keep their shape."""
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {key: move(value, device) for key, value in example.items()}
    if isinstance(example, list | tuple):
        moved = [move(value, device) for value in example]
        return tuple(moved) if isinstance(example, tuple) else moved
    return example


def call(model: nn.Module, example: Any) -> Any:
    """The model applied to a tensor, a tuple or list of arguments, or a mapping of named arguments.

    Raises:
        MisfitError: the model refuses them.
    """
    if isinstance(example, Mapping):
        return run(model, (), example)
    return run(model, tuple(example) if isinstance(example, tuple | list) else (example,), {})


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` names an argument `name`."""
    try:
        return name in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False


def logits_of(output: Any) -> Tensor:
    """The scores in a model's answer: a tensor, its `logits`, or the first entry of a tuple.

    Raises:
        UsageError: the answer holds no tensor in any of these places.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    raise UsageError(
        f"the model returned {type(output).__name__} without logits; expected a tensor, an object or mapping "
        "with `logits`, or a tuple that starts with them"
    )


def batch_size_of(example: Any) -> int | None:
    """The leading size of the first tensor in `example`; None where there is no tensor with a size."""
    shape = _shape_of(example)
    return shape[0] if shape else None


def input_of(example: Any) -> dict[str, Any]:
    """What a measurement on `example` is told with: its batch, and the sizes of its first tensor in words.

    Example:
        >>> input_of({"input_ids": torch.ones(1, 128)})
        {'batch': 1, 'input': '1 x 128'}
    """
    shape = _shape_of(example)
    return {"batch": shape[0], "input": " x ".join(map(str, shape))} if shape else {}


def _shape_of(example: Any) -> tuple[int, ...]:
    """The sizes of the first tensor that has some."""
    if isinstance(example, Tensor):
        return tuple(example.shape)
    if not isinstance(example, Mapping | tuple | list):
        return ()
    parts = example.values() if isinstance(example, Mapping) else example
    return next((shape for part in parts if (shape := _shape_of(part))), ())
