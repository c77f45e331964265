"""Fine-tuning after pruning: the kept weights learn to do without the pruned ones, which stay exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from secateur.core.digest import digest
from secateur.core.forward import undisturbed
from secateur.core.masks import Masks
from secateur.errors import NumericError, UsageError
from secateur.measurement import Measurement
from secateur.recover.batches import identity
from secateur.recover.loop import Make, train_
from secateur.recover.losses import IGNORED, Loss, inputs_and_labels, loss_named, loss_of
from secateur.recover.training import Judge, Options, Tuned, name_of, training

__all__ = ["Metric", "finetune_", "judge_by"]

Metric = Callable[[nn.Module, Any], Any]


def finetune_(
    model: nn.Module,
    data: Iterable[Any],
    masks: Masks | None = None,
    *,
    loss: str | Loss | None = None,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    better: Literal["higher", "lower"] | None = None,
    pruner: Make | None = None,
    **options: Unpack[Options],
) -> Tuned:
    """Train a pruned model on; pruned weights stay exactly zero, and the best epoch is kept.

    Args:
        model: trained in place, where its parameters need a gradient.
        data: a list of batches, whose rows are shuffled each epoch, or anything sized that can be walked
            through once an epoch (a DataLoader). A batch is a pair `(inputs, labels)`, a mapping of named inputs
            with or without `labels`, or a tensor of token ids.
        masks: what `prune_` returned. Without them zeros are weights like any other and will be trained away.
        loss: a name of `LOSSES` (language-model, single-label, multi-label, regression), or one's own
            `loss(output, labels)`, as for `prune_`; None chooses by the shapes where they leave no doubt.
        validation: batches that are never trained on.
        metric: `(model, validation) -> Measurement or number`, as `evaluate.accuracy` and `evaluate.perplexity`
            are; None for the loss itself.
        better: whether more or less of the metric is better; needed where its name does not say so.
        pruner: `(model, optimizer, steps) -> Gradual`, to prune while the model trains instead of holding masks.
            Epochs before it is done are never kept; the result says what is pruned in the end.
        options: `epochs`, `lr`, `original_lr`, `warm_up`, `decay`, `weight_decay`, `clip`, `accumulate`,
            `autocast`, `patience`, `optimizer`, `seed`, `checkpoint`, `every`, `tell`; see `Training`. By default
            three epochs of AdamW at a tenth of the original rate.

    Returns:
        The history, epoch by epoch, and which epoch was kept; the state before training is one of them.

    Raises:
        UsageError: data, shapes, options or a checkpoint that do not fit; masks of another model; a schedule that
            does not end before training does.
        InputError: a checkpoint that was altered.
        NumericError: NaN or Inf in the loss, the gradients or the weights; says at which step, and the model has
            its last good state.

    Cost: `epochs` forward and backward passes of the data and a validation after each; memory for the gradients,
        two moments, and one more copy of the weights (the best). With `checkpoint`, one pass over the data to
        tell them from others, and a file of four times the weights.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 2)
        >>> masks = Masks({"weight": torch.rand(2, 4) > 0.5})
        >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> tuned = finetune_(model, data, masks, epochs=2, lr=1e-3)
        >>> tuned.best, bool((model.weight[~masks["weight"]] == 0).all())
        (2, True)
    """
    how = training(**options)
    chosen = loss_named(loss)
    if pruner is not None and masks:
        raise UsageError(
            "masks= are held and pruner= prunes on; give the masks to the pruner instead, Gradual(masks=...)"
        )

    def objective(batch: Any) -> Tensor:
        return loss_of(model, batch, chosen)

    judge = judge_by(model, validation, metric, better, objective)
    about = {"task": "finetune", "loss": "by shape" if chosen is None else name_of(chosen)}
    return train_(
        model,
        objective,
        data,
        how,
        masks=masks,
        judge=judge,
        pruner=pruner,
        label="fine-tuning" if pruner is None else "pruning gradually",
        about=about,
    )


def judge_by(
    model: nn.Module,
    validation: Iterable[Any] | None,
    metric: Metric | None,
    better: Literal["higher", "lower"] | None,
    objective: Callable[[Any], Tensor],
) -> Judge | None:
    """What says which epoch is best; None without validation data.

    Raises:
        UsageError: a metric without data, or data that can be walked through only once.
    """
    if validation is None:
        if metric is not None:
            raise UsageError("metric= needs data to measure on; give validation=")
        return None
    if iter(validation) is validation:
        raise UsageError("validation can be walked through only once; give a list of batches or a DataLoader")
    name = "loss" if metric is None else name_of(metric).rpartition(".")[2]
    if better not in (None, "higher", "lower"):
        raise UsageError(f"better is {better!r}; expected higher or lower")

    def measure() -> Measurement:
        if metric is None:
            return _mean(model, validation, objective)
        with undisturbed(model):
            found = metric(model, validation)
        return found if isinstance(found, Measurement) else Measurement(name, found, "1")

    def seen() -> str:
        return (
            f"{name}:{digest(validation) if isinstance(validation, list | tuple) else identity(validation, 0)}"
        )

    return Judge(measure, better, seen)


def _mean(model: nn.Module, validation: Iterable[Any], objective: Callable[[Any], Tensor]) -> Measurement:
    """Mean of the objective, each batch counting by what it is judged by."""
    total, weight, batches = 0.0, 0, 0
    with undisturbed(model):
        for batch in validation:
            count = _judged(batch)
            total += float(objective(batch)) * count
            weight += count
            batches += 1
    if not weight:
        raise UsageError("validation holds nothing to judge by; give batches with labels")
    if not abs(total) < float("inf"):
        raise NumericError(f"the loss on the validation data is {total}")
    return Measurement("loss", total / weight, "1", {"dataset": "validation", "batches": batches})


def _judged(batch: Any) -> int:
    """How many labels a batch is judged by; real tokens or rows where it brings none."""
    inputs, labels = inputs_and_labels(batch)
    if labels is not None:
        return int((labels != IGNORED).sum())
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    if "attention_mask" in named:
        return int(named["attention_mask"].sum())
    first = next(iter(named.values()))
    return len(first) if first.is_floating_point() else first.numel()
