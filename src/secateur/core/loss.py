"""What a model is trained for, as one number for a batch: the user's loss, or the one that the batch implies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.forward import call
from secateur.errors import NumericError, UsageError

__all__ = ["Loss", "check_classes", "loss_of"]

IGNORED = -100  # torch's word for a target that does not count

Loss = Callable[[Any, Any], Tensor]  # (what the model returns, the target) -> one number


def loss_of(model: nn.Module, batch: Any, loss: Loss | None = None) -> tuple[Tensor, int]:
    """The mean loss of one batch, with its graph, and the number of predictions that the mean is taken over.

    Args:
        model: as it is, in its own mode; gradients flow if they are switched on.
        batch: `(inputs, target)`, a mapping of keyword arguments of which `labels` is the target, or inputs alone.
        loss: `loss(output, target)`, such as `nn.CrossEntropyLoss()`; without labels the target is the batch itself.
            None takes what the batch implies: the loss that the model returns when it is given labels,
            cross-entropy where targets are classes, the next token where a language model is given nothing but
            token ids (padding, told by `attention_mask`, does not count).

    Returns:
        A scalar, and its weight in a mean over batches: predictions where they can be told, else rows.

    Raises:
        UsageError: the batch implies no loss, or `loss` returns no scalar.
        NumericError: NaN or Inf.

    Example:
        >>> value, count = loss_of(nn.Linear(4, 2), (torch.zeros(3, 4), torch.tensor([0, 1, 1])))
        >>> value.shape, count
        (torch.Size([]), 3)
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = _moved(batch, device)
    inputs, target = _apart(batch)
    if loss is not None:
        value, count = loss(_call(model, inputs), batch if target is None else target), _rows(inputs)
    elif isinstance(batch, Mapping) and target is not None:
        value, count = _own_loss(model, batch, target)
    else:
        value, count = _implied(_call(model, inputs), inputs, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"loss(output, target) is to return one number, a tensor of shape (), got {got}")
    if not bool(value.detach().isfinite()):
        raise NumericError("the loss of a calibration batch is NaN or Inf; look at the data and at the model")
    return value.reshape(()), count


def _apart(batch: Any) -> tuple[Any, Any]:
    """Inputs and target; the target is None where the batch holds none."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    if isinstance(batch, tuple | list):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _call(model: nn.Module, inputs: Any) -> Any:
    return call(model, inputs if isinstance(inputs, Mapping) else (inputs,))


def _own_loss(model: nn.Module, batch: Mapping[str, Any], labels: Any) -> tuple[Tensor, int]:
    output = call(model, batch)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is None:
        raise UsageError(
            f"{type(model).__name__} was given labels and returns no loss; pass loss=, a function of "
            "(output, labels)"
        )
    classes = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 1
    return value, int(torch.count_nonzero(labels != -100)) if classes else _rows(batch)


def _implied(output: Any, inputs: Any, target: Any) -> tuple[Tensor, int]:
    """Cross-entropy with classes, or with the next token."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    logits = output if isinstance(output, Tensor) else found
    if isinstance(logits, Tensor) and logits.dim() > 1:
        if isinstance(target, Tensor) and target.dtype == torch.long:
            if logits.shape[:-1] == target.shape:
                logits, target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
            if logits.dim() == target.dim() + 1:
                check_classes(logits, target)
                return F.cross_entropy(logits.float(), target), int(torch.count_nonzero(target != -100))
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
        if target is None and isinstance(ids, Tensor) and _speaks_of_tokens(logits, ids):
            return _next_token(logits, ids, inputs)
    raise UsageError(
        "what the model is trained for cannot be told from this batch; pass loss=, a function of (output, target), "
        "and batches of (inputs, target), or mappings with labels"
    )


def check_classes(logits: Tensor, target: Tensor) -> None:
    """Targets are classes that the logits, (N, classes, ...), speak of.

    Raises:
        UsageError: another number of targets, or a class that is none; on an accelerator such a one ends the process.
    """
    expected = logits.shape[:1] + logits.shape[2:]
    if expected != target.shape:
        raise UsageError(
            f"targets of shape {tuple(target.shape)} do not fit logits of shape {tuple(logits.shape)}; expected "
            f"{tuple(expected)}, one class for each"
        )
    kept = target[target != IGNORED]
    low, high = (int(end) for end in kept.aminmax()) if kept.numel() else (0, 0)
    classes = logits.shape[1]
    if low < 0 or high >= classes:
        raise UsageError(
            f"targets from {low} to {high} where the model tells {classes} classes apart; expected whole numbers from "
            f"0 to {classes - 1}, or {IGNORED} to skip"
        )


def _speaks_of_tokens(logits: Tensor, ids: Tensor) -> bool:
    return ids.dtype == torch.long and logits.dim() == 3 and logits.shape[:2] == ids.shape


def _next_token(logits: Tensor, ids: Tensor, inputs: Any) -> tuple[Tensor, int]:
    labels = ids[:, 1:]
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is not None and mask.shape == ids.shape:
        labels = labels.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), -100)
    count = int(torch.count_nonzero(labels != -100))
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    # a sum, because a batch of single tokens predicts nothing, and its mean would be NaN
    return F.cross_entropy(flat, labels.reshape(-1), reduction="sum") / max(1, count), count


def _rows(inputs: Any) -> int:
    """The leading size of the first tensor."""
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()), 1)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return [_moved(value, device) for value in batch] if isinstance(batch, tuple | list) else batch
