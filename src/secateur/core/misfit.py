"""What to say where a model's own forward pass refuses its inputs: which module, what it takes, what it was given."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - of the example
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError

__all__ = ["MisfitError", "run"]

OURS = str(Path(__file__).parents[1])


class MisfitError(UsageError):
    """A model and its inputs do not fit together.

    Attributes:
        reason: the inputs, the innermost module that was reached, and what that raised.
    """

    reason = ""


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`model(*args, **kwargs)`; nothing is looked at unless that raises.

    Raises:
        MisfitError: an exception of the model's own code, or of torch's below it.
        Whatever else the call raises, as it is: memory that ran out, errors of secateur and defects of its hooks.

    Example:
        >>> run(nn.Sequential(nn.Linear(3, 2)), (torch.ones(1, 3, dtype=torch.int64),), {})
        Traceback (most recent call last):
        ...
        secateur.core.misfit.MisfitError: the model cannot be run on inputs of (1, 3) int64: 0 (Linear, weight 2 x 3) \
was given (1, 3) int64 and raised RuntimeError: mat1 and mat2 must have the same dtype, but got Long and Float; do \
they fit together?
    """
    try:
        return model(*args, **kwargs)
    except (SecateurError, MemoryError):
        raise
    except Exception as error:
        reason = _reason(model, args, kwargs, error)
        if not reason:
            raise
        misfit = MisfitError(f"the model cannot be run on {reason}; do they fit together?")
        misfit.reason = reason
        raise misfit from error


def _reason(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    """Empty where the model's own forward pass is not what failed."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if "allocate memory" in words or "out of memory" in words:
        return ""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [at for at, frame in enumerate(frames) if id(frame.f_locals.get("self")) in paths]
    if not inside or any(frame.f_code.co_filename.startswith(OURS) for frame in frames[inside[-1] + 1 :]):
        return ""
    module = frames[inside[-1]].f_locals["self"]
    given = [
        frame.f_locals for frame in frames if frame.f_locals.get("self") is module and "args" in frame.f_locals
    ]
    inner = _shapes(given[-1]["args"], given[-1].get("kwargs", {})) if given else "something"
    path, weight = paths[id(module)], getattr(module, "weight", None)
    size = f", weight {' x '.join(map(str, weight.shape))}" if isinstance(weight, Tensor) else ""
    who = f"{path} ({type(module).__name__}{size}) was given {inner} and raised" if path else "it raised"
    return f"inputs of {_shapes(args, kwargs)}: {who} {words}"


def _shapes(args: Any, kwargs: Any) -> str:
    """Shape and type of every argument, by name where it has one."""
    named = kwargs if isinstance(kwargs, Mapping) else {}
    found = [_shape(value) for value in args] + [f"{name} {_shape(value)}" for name, value in named.items()]
    return ", ".join(found) or "nothing"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return str(value) if value is None or isinstance(value, bool | int | float) else type(value).__name__
