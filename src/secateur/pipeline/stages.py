"""What each stage does to the subject; one function a kind, all of one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import measure as measuring
from secateur.apply import apply_, intention
from secateur.core.masks import Masks
from secateur.errors import UsageError
from secateur.measure import Tell
from secateur.pipeline.shrinking import shrink_
from secateur.pipeline.spec import Distillation, Gradually, Pruning, Quantization, Shrinking, Training
from secateur.pipeline.subject import Subject, needs_data, settled
from secateur.prune import Plan
from secateur.recover import distill_, finetune_
from secateur.recover.training import Tuned
from secateur.request import PruneRequest
from secateur.schedule import Due, constant, cubic, exponential, linear
from secateur.training import Gradual

__all__ = ["Done", "Work", "carry_out"]

EVERY = 50  # steps between two checkpoints of a stage that trains


@dataclass(frozen=True)
class Work:
    """Where a stage works.

    Attributes:
        state: folder for what resuming needs.
        tell: progress.
    """

    state: Path
    tell: Tell

    @property
    def training(self) -> Path:
        """The checkpoint of the stage that trains now."""
        return self.state / "training.safetensors"


@dataclass(frozen=True)
class Done:
    """What a stage did: facts for the record, and sentences for its reader."""

    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def carry_out(name: str, subject: Subject, settings: Any, work: Work) -> Done:
    """One stage."""
    return _STAGES[name](subject, settings, work)


def prune(subject: Subject, settings: Pruning, work: Work) -> Done:
    """Prune the model as it is now; what earlier stages pruned stays pruned."""
    asked, todo = settled(settings.asked, subject.loaded, subject.by.example)
    chosen = {name for site in todo.sites for name in site.parameters}
    before = Masks({name: mask for name, mask in subject.masks.items() if name in chosen})
    if settings.gradually is not None:
        return _gradually(subject, settings.gradually, asked, todo, before, work)
    batches = None
    if subject.calibration is not None:
        batches = measuring.counted(subject.calibration.batches(), "calibration", work.tell)
    applied = apply_(asked, todo, subject.model, batches, work.tell, masks=before or None)
    subject.masks = Masks({**subject.masks, **applied.masks})
    details = {"recipe": applied.recipe.describe(), **applied.details}
    notes = (*intention(asked, asked, todo), *applied.notes)
    if asked.shrink:
        facts, said = shrink_(subject)
        details, notes = details | {"shrunk": facts}, (*notes, *said)
    return Done(details, notes)


def shrink(subject: Subject, settings: Shrinking, work: Work) -> Done:
    """Take out the units that earlier stages pruned wholly."""
    work.tell("taking units out", 0, 1)
    facts, notes = shrink_(subject, homogeneous=settings.homogeneous)
    work.tell("taking units out", 1, 1)
    return Done(facts, notes)


def _gradually(
    subject: Subject, how: Gradually, asked: PruneRequest, todo: Plan, before: Masks, work: Work
) -> Done:
    """Prune to a schedule while the model trains."""
    if todo.analysis is not None:
        raise UsageError(
            f"{todo.recipe.pattern!r}: whole units go at once in an experiment; leave schedule out"
        )
    start = before.zeros / todo.size
    end = todo.sparsity if asked.sparsity is None else asked.sparsity
    if end is None:
        raise UsageError(f"{todo.recipe} decides how much is cut, so no schedule can; leave schedule out")
    schedule = constant(end) if how.schedule == "constant" else _SCHEDULES[how.schedule or "cubic"](start, end)
    calibration = subject.calibration if needs_data(todo.recipe, Pruning(asked, how)) else None

    def make(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Gradual:
        due = Due.spread(steps, how.begin, how.end, how.updates)
        return Gradual(
            model,
            todo.recipe,
            schedule,
            due.begin,
            due.end,
            due.every,
            optimizer=optimizer,
            data=None if calibration is None else calibration.batches(),
            only=list(asked.only) or None,
            skip=list(asked.skip) or None,
            seed=asked.seed,
            masks=before or None,
        )

    tuned = finetune_(subject.model, _batches(subject), pruner=make, **_options(subject, how, work))
    subject.masks = Masks({**subject.masks, **tuned.masks})
    done = _tuned(tuned)
    return Done({"recipe": todo.recipe.describe(), "schedule": repr(schedule), **done.details}, done.notes)


def train(subject: Subject, settings: Training, work: Work) -> Done:
    """Learn from the data, pruned weights held at zero."""
    with subject.rounded() as masks:
        tuned = finetune_(subject.model, _batches(subject), masks or None, **_options(subject, settings, work))
    return _tuned(tuned)


def distil(subject: Subject, settings: Distillation, work: Work) -> Done:
    """Learn to answer as the teacher does, pruned weights held at zero."""
    teacher = subject.dense if settings.teacher is None else subject.teachers[settings.teacher].model
    gaps = {key: getattr(settings, key) for key in ("soft", "temperature", "hard", "hidden", "attention")}
    options = gaps | _options(subject, settings, work)
    with subject.rounded() as masks:
        tuned = distill_(subject.model, teacher, _batches(subject), masks or None, **options)
    return _tuned(tuned)


def quantize(subject: Subject, settings: Quantization, work: Work) -> Done:
    """From now on the model is measured as integers; stages that train see its weights rounded."""
    subject.quantization = settings
    _, done = subject.quantized()
    left = [f"{name}: {reason}" for name, reason in done.left_out]
    squares = [layer.error * layer.size for layer in done.layers]
    details = {
        "weights": len(done.layers),
        "schemes": sorted({layer.scheme for layer in done.layers}),
        "zeros among the integers": done.sparsity,
        "rounded to zero": done.rounded_to_zero,
        "rounding error": sum(squares) / sum(layer.size for layer in done.layers),
        "left out": left,
    }
    trained = any(stage.name in ("train", "distil", "fine-tune") for stage in subject.experiment.stages)
    dynamic = settings.scheme == "int8-dynamic" and trained
    note = "Training sees weights rounded, and not the inputs that int8-dynamic rounds as well."
    return Done(details, (note,) if dynamic else ())


def export(subject: Subject, settings: Any, work: Work) -> Done:
    """What is written is written at the end, whatever the stages were; here is nothing to do."""
    return Done()


def _batches(subject: Subject) -> list[Any]:
    if subject.material is None:
        raise UsageError("a stage that trains has no data; give train")
    return subject.material.batches


def _options(subject: Subject, settings: Training, work: Work) -> dict[str, Any]:
    """Keywords of `finetune_` and `distill_`."""
    assert subject.material is not None
    options = {key: getattr(settings, key) for key in Training.model_fields}
    options |= {"seed": subject.experiment.common.seed, "checkpoint": work.training, "every": EVERY}
    return options | {"validation": subject.material.held_out, "tell": work.tell}


def _tuned(tuned: Tuned) -> Done:
    history = [
        {"epoch": epoch.number, "steps": epoch.steps, **{m.name: m.value for m in epoch.measurements}}
        for epoch in tuned.history
    ]
    details = {"epoch kept": tuned.best, "steps": tuned.steps, "lr": tuned.lr, "stopped": tuned.stopped}
    return Done({**details, "history": history}, tuned.notes)


_SCHEDULES = {"linear": linear, "cubic": cubic, "exponential": exponential}
_STAGES: dict[str, Callable[[Subject, Any, Work], Done]] = {
    "train": train,
    "distil": distil,
    "prune": prune,
    "shrink": shrink,
    "quantize": quantize,
    "fine-tune": train,
    "export": export,
}
