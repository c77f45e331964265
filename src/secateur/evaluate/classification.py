"""How often a classifier is right: accuracy and F1 for two classes, many, or several labels at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.forward import call, device_of, dtype_of, logits_of, move, undisturbed
from secateur.errors import NumericError, UsageError, nearest
from secateur.measurement import Condition, Measurement

__all__ = ["AVERAGES", "Predictions", "accuracy", "f1", "predict"]

AVERAGES = ("macro", "micro", "weighted", "binary")
"""The ways `f1` joins classes."""

IGNORED = -100
"""A label that asks not to be judged, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Predictions:
    """What a model said and what was true, over a whole data set.

    Args:
        task: `binary`, `multiclass` or `multilabel`.
        labels: `(examples,)` class numbers, or `(examples, labels)` of 0 and 1 for `multilabel`.
        predicted: the same shape.
        conditions: task, examples, dataset, batch, threshold, number format.
    """

    task: str
    labels: Tensor
    predicted: Tensor
    conditions: Mapping[str, Condition]


def predict(
    model: nn.Module, batches: Iterable[Any], *, threshold: float = 0.0, dataset: str = ""
) -> Predictions:
    """Run a classifier over labelled batches once; `accuracy` and `f1` take the answer.

    The task follows from the shapes: logits `(N, C)` with labels `(N,)` choose the largest of C classes;
    logits `(N,)` or `(N, 1)` with labels `(N,)` are binary; logits and labels both `(N, C)` with C > 1, the
    labels 0 and 1, are several labels at once. More leading dimensions (one label per token) are flattened.
    Labels of -100 are left out.

    Args:
        model: returns logits.
        batches: `(inputs, labels)` pairs, or mappings with `labels` and the model's named inputs. Inputs are
            a tensor, a tuple of arguments or a mapping.
        threshold: a binary answer or a label is positive above it; 0 for logits, 0.5 for probabilities.
        dataset: a name for the data, kept in the conditions.

    Raises:
        UsageError: no batch, a batch of another form, shapes that fit no task, a label that is no class, or
            batches of different tasks.
        NumericError: logits with NaN.

    Cost: one forward pass per batch.
    """
    labels: list[Tensor] = []
    predicted: list[Tensor] = []
    tasks: list[str] = []
    largest = 0
    device = device_of(model)
    with undisturbed(model):
        for number, batch in enumerate(batches):
            inputs, truth = _split(batch, number)
            logits = logits_of(call(model, move(inputs, device))).cpu()
            largest = max(largest, len(truth) if truth.dim() else 0)
            task, true, chosen = _decide(logits, truth.detach().cpu(), threshold, number)
            tasks.append(task)
            labels.append(true)
            predicted.append(chosen)
    if not labels or not sum(len(part) for part in labels):
        raise UsageError("there is no labelled example to judge; expected batches of (inputs, labels)")
    if len(set(tasks)) > 1:
        raise UsageError(f"the batches are of different tasks ({', '.join(sorted(set(tasks)))}); give one kind")
    conditions: dict[str, Condition] = {"task": tasks[0], "dataset": dataset}
    conditions |= {"examples": sum(len(part) for part in labels), "batch": largest}
    if tasks[0] != "multiclass":
        conditions["threshold"] = threshold
    conditions |= {"dtype": dtype_of(model), "device": device.type}
    return Predictions(tasks[0], torch.cat(labels), torch.cat(predicted), conditions)


def accuracy(
    model: nn.Module | Predictions, batches: Iterable[Any] | None = None, **options: Any
) -> Measurement:
    """The fraction of examples that are right; with several labels at once, all of an example's must be.

    Args:
        model: the classifier, or what `predict` returned (then no batches).
        batches: see `predict`.
        options: `threshold` and `dataset`, see `predict`.

    Raises:
        UsageError: see `predict`.
        NumericError: logits with NaN.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
        >>> print(accuracy(nn.Identity(), [(x, torch.tensor([0, 1, 1]))]))
        accuracy 0.6667 (multiclass, 3 examples, batch 3)
    """
    found = _predictions(model, batches, options)
    right = found.labels == found.predicted
    if found.task == "multilabel":
        right = right.all(dim=1)
    return Measurement("accuracy", int(right.sum()) / len(right), "1", found.conditions)


def f1(
    model: nn.Module | Predictions,
    batches: Iterable[Any] | None = None,
    *,
    average: str = "macro",
    **options: Any,
) -> Measurement:
    """F1, the harmonic mean of precision and recall, through scikit-learn.

    Args:
        model: the classifier, or what `predict` returned (then no batches).
        batches: see `predict`.
        average: `macro` (mean over the classes that occur in truth or prediction), `micro` (over all
            decisions), `weighted` (by how often a class is true) or `binary` (the positive class alone).
        options: `threshold` and `dataset`, see `predict`.

    Returns:
        `f1`; a class without any true or predicted example counts 0.

    Raises:
        UsageError: see `predict`; unknown average; `binary` where there are more than two classes;
            scikit-learn is missing.
        NumericError: logits with NaN.
    """
    if average not in AVERAGES:
        raise UsageError(f"unknown average {average!r}; {nearest(str(average), AVERAGES)}")
    try:
        from sklearn.metrics import f1_score
    except ImportError as error:
        raise UsageError("F1 needs scikit-learn: pip install 'secateur[metrics]'") from error
    found = _predictions(model, batches, options)
    true, chosen = found.labels.numpy(), found.predicted.numpy()
    if average == "binary" and (found.task == "multilabel" or max(true.max(), chosen.max()) > 1):
        raise UsageError(
            f'average="binary" needs two classes, got a {found.task} task; use macro, micro or weighted'
        )
    value = f1_score(true, chosen, average=average, zero_division=0.0)
    return Measurement("f1", float(value), "1", {"average": average} | dict(found.conditions))


def _predictions(
    model: nn.Module | Predictions, batches: Iterable[Any] | None, options: dict[str, Any]
) -> Predictions:
    if isinstance(model, Predictions):
        if batches is not None or options:
            raise UsageError("these predictions are made already; give no batches and no options with them")
        return model
    if batches is None:
        raise UsageError("a model needs batches of (inputs, labels) to be judged on")
    return predict(model, batches, **options)


def _split(batch: Any, number: int) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise UsageError(f"batch {number} has no labels; it holds {sorted(map(str, batch))}")
        inputs: Any = {key: value for key, value in batch.items() if key != "labels"}
        return inputs, torch.as_tensor(batch["labels"])
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], torch.as_tensor(batch[1])
    raise UsageError(
        f"batch {number} must be a pair (inputs, labels) or a mapping with labels, got {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
    )


def _decide(logits: Tensor, labels: Tensor, threshold: float, number: int) -> tuple[str, Tensor, Tensor]:
    """The task, the true labels and the predicted ones of one batch."""
    if logits.isnan().any():
        raise NumericError(f"batch {number}: the logits hold NaN; look for NaN or Inf in the weights")
    if logits.dim() == labels.dim() + 1 and logits.shape[:-1] == labels.shape:
        if logits.shape[-1] > 1:
            classes = logits.shape[-1]
            true, chosen = labels.flatten(), logits.argmax(dim=-1).flatten()
            return "multiclass", *_judged(true, chosen, classes, number)
        logits = logits.squeeze(-1)
    if logits.shape != labels.shape:
        raise UsageError(
            f"batch {number}: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} fit no task; "
            "expected (N, C) with (N,), (N,) or (N, 1) with (N,), or (N, C) with (N, C)"
        )
    chosen = (logits > threshold).long()
    if logits.dim() >= 2 and logits.shape[-1] > 1:
        width = logits.shape[-1]
        if not ((labels == 0) | (labels == 1)).all():
            raise UsageError(f"batch {number}: several labels at once must be 0 or 1 each")
        return "multilabel", labels.long().reshape(-1, width), chosen.reshape(-1, width)
    return "binary", *_judged(labels.flatten(), chosen.flatten(), 2, number)


def _judged(true: Tensor, chosen: Tensor, classes: int, number: int) -> tuple[Tensor, Tensor]:
    kept = true != IGNORED
    true, chosen = true[kept], chosen[kept]
    if len(true) and not ((true >= 0) & (true < classes) & (true == true.long())).all():
        raise UsageError(
            f"batch {number}: labels must be whole numbers from 0 to {classes - 1}, or {IGNORED} to skip"
        )
    return true.long(), chosen
