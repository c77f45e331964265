"""What a model is trained on: four losses by name, and the user's own.

A loss by name is a function of logits and labels, labels of -100 left out; one's own gets what the model returns
and the labels, as everywhere in secateur.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.forward import call, device_of, logits_of, move
from secateur.core.loss import IGNORED, Loss, check_classes
from secateur.errors import UsageError, nearest

__all__ = [
    "IGNORED",
    "LOSSES",
    "Loss",
    "chosen_by_shape",
    "inputs_and_labels",
    "judged",
    "labels_of",
    "language_model",
    "loss_named",
    "loss_of",
    "multi_label",
    "regression",
    "single_label",
]


def language_model(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token.

    Args:
        logits: "batch tokens vocabulary".
        labels: "batch tokens", the input ids themselves; the shift by one is made here.

    Raises:
        UsageError: shapes that do not belong to each other.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise _misfit("language-model", logits, labels, "(batch, tokens, vocabulary) with (batch, tokens)")
    return single_label(logits[:, :-1], labels[:, 1:])


def single_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of one class for each example: mean over the labels that count; 0 where none does.

    Args:
        logits: "... classes", or one logit an example for two classes; "batch classes ..." for maps of labels.
        labels: whole numbers.

    Raises:
        UsageError: shapes that do not belong to each other.
    """
    if logits.shape == labels.shape or (logits.shape[-1:] == (1,) and logits.shape[:-1] == labels.shape):
        return multi_label(logits.reshape(labels.shape), labels)  # one logit: the class or not the class
    if logits.dim() > 2 and logits.shape[:-1] != labels.shape:
        logits = logits.movedim(1, -1)  # torch's layout for images: classes come second
    if logits.shape[:-1] != labels.shape:
        raise _misfit("single-label", logits, labels, "(N, classes) with (N,)")
    labels, logits = labels.flatten().long(), logits.flatten(0, -2)
    check_classes(logits, labels)
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def multi_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of several yes-or-no labels for each example, mean over the labels that count.

    Args:
        logits: one for each label.
        labels: 0 or 1, of the same shape.

    Raises:
        UsageError: shapes that differ.
    """
    if logits.shape != labels.shape:
        raise _misfit("multi-label", logits, labels, "equal shapes")
    kept = labels != IGNORED
    each = F.binary_cross_entropy_with_logits(
        logits.float(), torch.where(kept, labels, 0).float(), reduction="none"
    )
    return (each * kept).sum() / kept.sum().clamp(min=1)


def regression(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error.

    Args:
        outputs: of the labels' shape, or with one trailing dimension of size 1 more.
        labels: real numbers.

    Raises:
        UsageError: shapes that do not belong to each other.
    """
    if outputs.shape[-1:] == (1,) and outputs.shape[:-1] == labels.shape:
        outputs = outputs.squeeze(-1)
    if outputs.shape != labels.shape:
        raise _misfit("regression", outputs, labels, "equal shapes")
    return F.mse_loss(outputs.float(), labels.float())


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "language-model": language_model,
    "single-label": single_label,
    "multi-label": multi_label,
    "regression": regression,
}
"""What a loss is called in files and on the command line."""


def loss_named(loss: str | Loss | None) -> Loss | None:
    """A loss by its name, or the given function; None stays None.

    Raises:
        UsageError: no loss of that name.

    Example:
        >>> loss_named("multi_label") is multi_label
        True
    """
    if not isinstance(loss, str):
        return loss
    name = loss.replace("_", "-")
    if name not in LOSSES:
        raise UsageError(f"loss {loss!r} is not known; {nearest(name, LOSSES)}, or give a function of your own")
    return LOSSES[name]


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of one batch, with gradients where they are switched on.

    Args:
        model: returns logits, alone or as `.logits`.
        batch: see `inputs_and_labels`.
        loss: a function of `LOSSES`, or one's own `loss(output, labels)` of what the model returns (without
            labels it gets the batch itself). None chooses by the shapes: no labels but token ids,
            `language_model`; whole numbers, one for each row of logits, `single_label`; whole numbers, one for
            each logit, `multi_label`; one real number for each example, `regression`.

    Raises:
        UsageError: a batch without labels, or shapes that fit no loss or more than one.
    """
    return judged(call(model, move(inputs_and_labels(batch)[0], device_of(model))), batch, loss)


def judged(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of what a model answered to a batch; see `loss_of`."""
    inputs, labels = inputs_and_labels(batch)
    if loss is not None and loss not in LOSSES.values():
        device = next((v.device for v in _tensors(output)), torch.device("cpu"))
        return loss(output, move(batch if labels is None else labels, device))
    logits = logits_of(output)
    chosen = chosen_by_shape(logits, labels) if loss is None else loss
    return chosen(logits, labels_of(inputs, labels).to(logits.device))


def _tensors(output: Any) -> list[Tensor]:
    values = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, tuple | list)
        else [output]
    )
    return [value for value in values if isinstance(value, Tensor)]


def inputs_and_labels(batch: Any) -> tuple[Any, Tensor | None]:
    """What the model is called with, and what it should say; None where a batch brings no labels.

    Args:
        batch: a pair `(inputs, labels)`, a mapping of named inputs with or without `labels`, or a tensor of
            token ids.

    Raises:
        UsageError: a batch of another form.
    """
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        named = {key: value for key, value in batch.items() if key != "labels"}
        return named, None if labels is None else torch.as_tensor(labels)
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], torch.as_tensor(batch[1])
    raise UsageError(
        "a batch to train on is a pair (inputs, labels), a mapping with labels, or token ids; got "
        f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
    )


def labels_of(inputs: Any, labels: Tensor | None) -> Tensor:
    """The given labels; without any, the tokens that a language model reads are what it is to predict, but for
    padding.

    Raises:
        UsageError: neither labels nor token ids.
    """
    if labels is not None:
        return labels
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
        raise UsageError(
            "the batches hold no labels, and no token ids to predict; give pairs (inputs, labels), or mappings "
            "with labels or input_ids"
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return ids if mask is None else torch.where(mask.bool(), ids, IGNORED)


def chosen_by_shape(logits: Tensor, labels: Tensor | None) -> Loss:
    """The loss that the shapes and the labels' type leave no doubt of; see `loss_of`.

    Raises:
        UsageError: they fit no loss, or more than one.
    """
    if labels is None:
        return language_model
    whole, one = not labels.is_floating_point(), logits.shape[:-1] == labels.shape
    if whole and (one or (logits.dim() > 2 and logits.shape[2:] == labels.shape[1:])):
        return single_label
    if whole and logits.shape == labels.shape:
        return multi_label
    if not whole and (labels.dim() <= 1) and logits.numel() == labels.numel():
        return regression
    raise UsageError(
        f"outputs of shape {tuple(logits.shape)} with {labels.dtype} labels of shape {tuple(labels.shape)} do not "
        f"say which loss is meant; give loss= one of {', '.join(LOSSES)}, or a function of your own"
    )


def _misfit(name: str, logits: Tensor, labels: Tensor, expected: str) -> UsageError:
    return UsageError(
        f"loss {name}: outputs of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not belong "
        f"to each other; expected {expected}"
    )
