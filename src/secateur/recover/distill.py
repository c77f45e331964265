"""Distillation: the pruned model learns to answer as the dense one does, not only what the labels say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.digest import digest
from secateur.core.forward import device_of, logits_of, move, undisturbed
from secateur.core.masks import Masks
from secateur.errors import UsageError
from secateur.recover.batches import trainable
from secateur.recover.finetune import Metric, judge_by
from secateur.recover.loop import train_
from secateur.recover.losses import (
    Loss,
    inputs_and_labels,
    judged,
    loss_named,
    multi_label,
    regression,
)
from secateur.recover.matching import Seen, Watched, attention_gap, hidden_gap, pairs_of, real_positions
from secateur.recover.training import Options, Tuned, name_of, training

__all__ = ["answer_gap", "distill_"]


@dataclass(frozen=True)
class _Weights:
    """How much each thing that a teacher shows counts; `hard` is the labels' share."""

    soft: float
    hard: float
    hidden: float
    attention: float

    def __post_init__(self) -> None:
        given = vars(self)
        wrong = [f"{name}={value!r}" for name, value in given.items() if not 0 <= value < float("inf")]
        if wrong or not any(given.values()):
            raise UsageError(
                "weights of what is learned must be at least 0, and one of them above; got "
                f"{', '.join(wrong) or 'only 0'}"
            )


def distill_(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    masks: Masks | None = None,
    *,
    soft: float = 1.0,
    temperature: float = 2.0,
    hard: float = 0.0,
    hidden: float = 0.0,
    attention: float = 0.0,
    pairs: Mapping[str, str] | None = None,
    loss: str | Loss | None = None,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    better: Literal["higher", "lower"] | None = None,
    **options: Unpack[Options],
) -> Tuned:
    """Train a pruned model to give what its teacher gives; pruned weights stay zero, the best epoch is kept.

    The loss is `soft` T^2 KL(teacher || student) of the answers at temperature T, plus `hard` times the loss on the
    labels, plus `hidden` times the error of the blocks' outputs, plus `attention` times the divergence of the
    attention maps. Each is a mean over what is real: padding does not count.

    Args:
        student: trained in place.
        teacher: most often a copy of the model before pruning; not changed.
        data: as for `finetune_`; without labels where `hard` is 0.
        masks: what `prune_` returned.
        soft: weight of the answers. Several yes-or-no labels (`loss="multi-label"`) are compared label by label,
            one real number (`loss="regression"`) by its squared error.
        temperature: T, above 0. Both models' logits are divided by it, so that what the teacher holds for unlikely
            shows.
        hard: weight of the labels' own loss.
        hidden: weight of the blocks' outputs, squared error as a fraction of the teacher's square; where widths
            differ, a linear map from the student's to the teacher's is learned along and thrown away.
        attention: weight of the attention maps (transformers models).
        pairs: module path in the student -> module path in the teacher, for `hidden`; None pairs the repeated
            blocks, evenly spaced where the student has fewer.
        loss, validation, metric, better, options: as for `finetune_`; without a metric the validation is judged by
            this very loss.

    Returns, Raises: as `finetune_`; UsageError also where the two models do not compare.

    Cost: that of `finetune_`, a forward pass of the teacher for every batch, and its memory.

    Source: Hinton, Vinyals, Dean 2015 (answers, T^2); Romero et al. 2015 (hidden states through a learned map; here
        relative to the teacher's square, so that weights mean the same in every model); Wang et al. 2020, MiniLM
        (KL of attention maps).
    """
    if teacher is student:
        raise UsageError("teacher and student are one model; take the teacher as a copy before pruning")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature is {temperature!r}; expected a number above 0")
    weights, how, chosen = _Weights(soft, hard, hidden, attention), training(**options), loss_named(loss)
    paired = dict(pairs or pairs_of(student, teacher)) if hidden else {}
    mine = Watched(student, tuple(paired), attention=attention > 0)
    theirs = Watched(teacher, tuple(paired.values()), attention=attention > 0)
    data = trainable(data)
    maps = _maps(mine, theirs, paired, data, how.seed)

    def objective(batch: Any) -> Tensor:
        inputs = move(inputs_and_labels(batch)[0], device_of(student))
        output, seen, attended = mine(inputs)
        with undisturbed(teacher):
            shown, shown_inside, shown_maps = theirs(inputs)
        logits, target = logits_of(output), logits_of(shown)
        total = logits.new_zeros(())
        if weights.soft:
            total = total + weights.soft * answer_gap(logits, target, temperature, chosen, inputs)
        if weights.hard:
            total = total + weights.hard * judged(output, batch, chosen)
        if weights.hidden:
            total = total + weights.hidden * _hidden(seen, shown_inside, paired, maps, inputs)
        if weights.attention:
            total = total + weights.attention * attention_gap(attended, shown_maps, inputs)
        return total

    about = {"task": "distill", "loss": "by shape" if chosen is None else name_of(chosen), **vars(weights)}
    about |= {"temperature": temperature, "pairs": paired}
    if how.checkpoint is not None:
        about["teacher"] = digest(teacher.state_dict())
    return train_(
        student,
        objective,
        data,
        how,
        masks=masks,
        judge=judge_by(student, validation, metric, better, objective),
        extra=maps if len(maps) else None,
        label="distillation",
        about=about,
    )


def answer_gap(
    logits: Tensor, target: Tensor, temperature: float, loss: Loss | None, inputs: Any = None
) -> Tensor:
    """How far a student's answers are from its teacher's: T^2 KL(teacher || student), mean over real positions.

    Args:
        logits, target: the student's and the teacher's, "... classes".
        temperature: T.
        loss: `multi_label`: each logit is an answer of its own; `regression`, or one output an example: squared
            error.
        inputs: of the models, for their padding.

    Raises:
        UsageError: shapes that differ.
    """
    if logits.shape != target.shape:
        raise UsageError(
            f"the student answers in shape {tuple(logits.shape)}, the teacher in {tuple(target.shape)}; distillation "
            "compares them one by one"
        )
    logits, target = logits.float(), target.float()
    if loss is regression or (loss is not multi_label and (logits.dim() < 2 or logits.shape[-1] == 1)):
        return F.mse_loss(logits, target)
    if logits.dim() == 3 and (real := real_positions(inputs, logits.shape)) is not None:
        logits, target = logits[real], target[real]
    if loss is multi_label:
        logits, target = (torch.stack([x, torch.zeros_like(x)], -1) for x in (logits, target))
    elif logits.dim() == 4:
        logits, target = logits.movedim(1, -1), target.movedim(1, -1)
    mine, theirs = ((x / temperature).log_softmax(-1) for x in (logits, target))
    return temperature**2 * (theirs.exp() * (theirs - mine)).sum(-1).mean()


def _hidden(mine: Seen, theirs: Seen, pairs: Mapping[str, str], maps: nn.ModuleList, inputs: Any) -> Tensor:
    """Mean gap over the pairs."""
    chosen: list[Any] = list(maps) or [None] * len(pairs)
    gaps = [
        hidden_gap(mine[own], theirs[other], None if isinstance(map_, nn.Identity) else map_, inputs)
        for (own, other), map_ in zip(pairs.items(), chosen, strict=True)
    ]
    return torch.stack(gaps).mean()


def _maps(mine: Watched, theirs: Watched, pairs: Mapping[str, str], data: Any, seed: int) -> nn.ModuleList:
    """A linear map for each pair whose widths differ, an identity for the others; empty where all agree."""
    if not pairs:
        return nn.ModuleList()
    device = device_of(mine.model)
    with torch.random.fork_rng(), undisturbed(mine.model), undisturbed(theirs.model):
        torch.manual_seed(seed)
        inputs = move(inputs_and_labels(next(iter(data)))[0], device)
        seen, shown = mine(inputs)[1], theirs(inputs)[1]
    found: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for own, other in pairs.items():
            here, there = (x.shape[1] if x.dim() >= 4 else x.shape[-1] for x in (seen[own], shown[other]))
            found.append(nn.Identity() if here == there else nn.Linear(here, there, bias=False).to(device))
    return nn.ModuleList(found if any(isinstance(each, nn.Linear) for each in found) else [])
