"""Back to where training started, with the masks of where it ended: the lottery ticket."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.core.hold import unwrapped
from secateur.core.masks import Masks, check_fits, named_parameters
from secateur.core.sharded import local, shard_like
from secateur.core.tied import same_tensor
from secateur.errors import UsageError, nearest

__all__ = ["rewind_"]


def rewind_(model: nn.Module, start: nn.Module | Mapping[str, Tensor], masks: Masks | None = None) -> nn.Module:
    """Set every weight and buffer back to an earlier state, with the pruned ones at zero; returns the model.

    With the state at initialisation this makes the "winning ticket" of the masks; deeper networks want the state after
    a little training (late rewinding). Make a new optimizer and a new `hold_` afterwards: momentum belongs to
    the weights that are gone.

    Args:
        model: as it was trained.
        start: a copy of its `state_dict()`, or of the model itself, made before or early in training.
        masks: what is to be zero; None for none.

    Raises:
        UsageError: a start without one of the model's tensors, with another shape, or that is no copy; masks of another
            model. Nothing has changed then.

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis"; Frankle, Dziugaite, Roy, Carbin 2020, "Linear Mode
        Connectivity and the Lottery Ticket Hypothesis" (rewinding to an early step).

    Example:
        >>> import copy
        >>> model = nn.Linear(2, 1, bias=False)
        >>> start = copy.deepcopy(model.state_dict())
        >>> _ = nn.init.ones_(model.weight)
        >>> masks = Masks({"weight": torch.tensor([[True, False]])})
        >>> rewind_(model, start, masks).weight.tolist() == [[start["weight"][0, 0].item(), 0.0]]
        True
    """
    model = unwrapped(model)
    earlier = unwrapped(start).state_dict() if isinstance(start, nn.Module) else start
    now = model.state_dict()
    for name, tensor in now.items():
        if isinstance(tensor, Tensor):
            _check(name, tensor, earlier)
    parameters = named_parameters(model)
    for name, mask in (masks or {}).items():
        check_fits(name, mask, parameters)
    with torch.no_grad():
        for name, tensor in now.items():
            if isinstance(tensor, Tensor):
                local(tensor).copy_(_of(tensor, earlier[name]))
    if masks is not None:
        masks.apply_(model)
    return model


def _of(tensor: Tensor, earlier: Tensor) -> Tensor:
    """What this process holds of the earlier values."""
    return local(earlier) if hasattr(earlier, "to_local") else shard_like(tensor, earlier)


def _check(name: str, tensor: Tensor, earlier: Mapping[str, Tensor]) -> None:
    if name not in earlier:
        raise UsageError(f"the start has no {name}; it belongs to another model; {nearest(name, earlier)}")
    if earlier[name].shape != tensor.shape:
        raise UsageError(
            f"{name}: the start has shape {tuple(earlier[name].shape)}, the model {tuple(tensor.shape)}; it belongs to "
            "another model"
        )
    if tensor.numel() and same_tensor(tensor, earlier[name]):
        raise UsageError(
            f"{name}: the start is the model's own memory, so training has changed it; keep a copy, "
            "copy.deepcopy(model.state_dict())"
        )
