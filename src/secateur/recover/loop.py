"""One training loop for fine-tuning and for distillation: pruned weights held at zero, best epoch kept, resumable.

What is special to either is one function, the objective: batch -> a loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.digest import digest
from secateur.core.forward import device_of
from secateur.core.hold import hold_
from secateur.core.masks import Masks, check_apart
from secateur.errors import InputError, NumericError, UsageError
from secateur.measurement import Measurement
from secateur.recover import state as states
from secateur.recover.batches import identity, trainable
from secateur.recover.training import Epoch, Judge, Training, Tuned

__all__ = ["Make", "train_"]

# (model, optimizer, steps of the whole training) -> anything with step(), masks, done, remove(), state_dict(),
# load_state_dict(), and usable in a with statement: a Gradual
Make = Callable[[nn.Module, torch.optim.Optimizer, int], Any]


def train_(
    model: nn.Module,
    objective: Callable[[Any], Tensor],
    data: Any,
    how: Training,
    *,
    masks: Masks | None = None,
    judge: Judge | None = None,
    extra: nn.Module | None = None,
    pruner: Make | None = None,
    label: str = "training",
    about: Mapping[str, Any] | None = None,
) -> Tuned:
    """Make an objective small.

    Args:
        model: trained in place where its parameters need a gradient.
        objective: batch -> loss, of `model` and perhaps of others.
        data: sized and walked through once an epoch; a list is shuffled.
        how: see `Training`.
        masks: pruned weights, held at zero.
        judge: says after each epoch how good the model is; the best epoch is kept.
        extra: parameters that are trained along and belong to no model.
        pruner: makes what prunes while training goes on, instead of masks; see `finetune_`.
        label: what progress is called.
        about: what else decides the result, for resuming.

    Raises:
        UsageError: data that cannot be walked through again, nothing to train, a checkpoint of another run, a
            schedule that does not end before training does.
        InputError: a checkpoint that cannot be read.
        NumericError: NaN or Inf in the loss, the gradients or the weights; the model has its last good state.
    """
    run = _Run(model, objective, trainable(data), how, masks or Masks({}), judge, extra, label, about or {})
    return run.go(pruner)


class _Run:
    """Where a training stands."""

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Any], Tensor],
        data: Any,
        how: Training,
        masks: Masks,
        judge: Judge | None,
        extra: nn.Module | None,
        label: str,
        about: Mapping[str, Any],
    ):
        self.model, self.objective, self.data, self.how = model, objective, data, how
        self.masks, self.judge, self.label = masks, judge, label
        self.whole = nn.ModuleList([model] if extra is None else [model, extra])
        self.optimizer = _optimizer(self.whole, self.how)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.steps = self.how.epochs * math.ceil(len(self.data) / self.how.accumulate)
        self.step = self.epoch = self.place = self.since = self.best = 0
        self.value: float | None = None
        self.losses: list[float] = []
        self.history: list[Epoch] = []
        self.began = time.perf_counter()
        self.resume_from: dict[str, Any] | None = None
        self.pruner: Any = None
        self.path = None if self.how.checkpoint is None else Path(self.how.checkpoint)
        self.about = {} if self.path is None else self._identity(about)

    def go(self, make: Make | None) -> Tuned:
        begun = self._begun()
        with states.as_before(self.model), self._holding(make):
            self.good = self._copied()
            if begun is not None:
                self._resume(*begun)
            elif self.judge is not None:
                self._judge()
            while self.epoch < self.how.epochs and not self._tired():
                self._epoch()
            self._take_good()
        stopped = "patience is over" if self._tired() else "all epochs done"
        masks = self.masks if self.pruner is None else self.pruner.masks
        return Tuned(tuple(self.history), self.best, self.step, self.how.rate, stopped, self._notes(), masks)

    def _holding(self, make: Make | None) -> AbstractContextManager[Any]:
        """What keeps pruned weights at zero: a pruner, or a hold of the given masks."""
        if make is None:
            return (
                hold_(self.model, self.masks, self.optimizer, gradients=True) if self.masks else nullcontext()
            )
        self.pruner = make(self.model, self.optimizer, self.steps)
        end = getattr(getattr(self.pruner, "due", None), "end", 0)
        if end > self.steps:
            self.pruner.remove()
            raise UsageError(
                f"the schedule never reaches its end: it ends at step {end:,}, and training has {self.steps:,} steps; "
                "end it earlier, or train for more epochs"
            )
        return self.pruner

    @property
    def _pruning(self) -> bool:
        """Whether the pruner has still to prune; until then no epoch can be the best."""
        return self.pruner is not None and not self.pruner.done

    def _epoch(self) -> None:
        """One pass over the data, or what is left of it."""
        states.seed_epoch(self.how.seed, self.epoch)
        self.model.train()
        batches, count = iter(self.data), len(self.data)
        for _ in range(self.place):
            self._next(batches, count)
        if self.resume_from is not None and self.place:  # an epoch's first batch is drawn from its seed
            states.set_generators(self.resume_from["tensors"], self.resume_from["generators"])
        self.resume_from = None
        while self.place < count:
            group = min(self.how.accumulate, count - self.place)
            for _ in range(group):
                self._learn(self._next(batches, count), group)
            self._step()
            if self.how.every and self.step % self.how.every == 0 and self.place < count:
                self._write()
        self.epoch, self.place = self.epoch + 1, 0
        self._judge()
        self.losses = []
        self._write()

    def _next(self, batches: Iterator[Any], count: int) -> Any:
        try:
            return next(batches)
        except StopIteration:
            raise UsageError(
                f"data say that they have {count} batches and gave fewer; mend their __len__"
            ) from None

    def _learn(self, batch: Any, group: int) -> None:
        """The gradients of one batch."""
        device = device_of(self.model).type
        with torch.autocast(device, torch.bfloat16, enabled=self.how.autocast is not None):
            loss = self.objective(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UsageError(f"the loss is {_shown(loss)}; expected a tensor with one number")
        value = float(loss.detach())
        self.place += 1
        if not math.isfinite(value):
            self._fail(f"the loss is {value}")
        (loss / group).backward()
        self.losses.append(value)

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.at(self.step, self.steps)
        limit = math.inf if self.how.clip is None else self.how.clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            self._fail(f"the norm of the gradients is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.pruner is not None:
            self.pruner.step()
        self.step += 1
        self.how.tell(self.label, self.step, self.steps)

    def _judge(self) -> None:
        """Measure, remember, and keep the state if it is the best so far."""
        found = []
        if self.losses:
            mean = math.fsum(self.losses) / len(self.losses)
            found.append(Measurement("training_loss", mean, "1", {"batches": len(self.losses)}))
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            self._fail("a weight is NaN or infinite")
        if self.judge is not None:
            try:
                found.append(self.judge.measure())
            except NumericError as error:
                self._fail(f"validation failed ({error})")
        self.since += 1
        if self.judge is None or self._pruning or self._better(found[-1], self.judge):
            self.good, self.best, self.since = self._copied(), self.epoch, 0
        now = time.perf_counter()
        self.history.append(Epoch(self.epoch, self.step, tuple(found), now - self.began))
        self.began = now

    def _better(self, found: Measurement, judge: Judge) -> bool:
        value, higher = float(found.value), judge.higher(found)
        if self.value is None or (value > self.value if higher else value < self.value):
            self.value = value
            return True
        return False

    def _tired(self) -> bool:
        return self.how.patience is not None and self.since > self.how.patience

    def _tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer, shared ones once."""
        return {name: t.detach() for name, t in (*self.whole.named_parameters(), *self.whole.named_buffers())}

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def _take_good(self) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(self.good[name])

    def _fail(self, what: str) -> None:
        """Put the last good state back and say where it broke."""
        self._take_good()
        self.optimizer.zero_grad()
        where = f"step {self.step + 1}, epoch {self.epoch + 1}, batch {self.place}"
        kept = f"epoch {self.best}" if self.best else "before training"
        raise NumericError(
            f"{self.label}: {what} at {where}. The model has its last good state again, that of {kept}; lower lr "
            f"(it was {self.how.rate:g}), set clip=, or look at this batch"
        )

    def _notes(self) -> tuple[str, ...]:
        notes = list(self.how.notes)
        if self.judge is None:
            notes.append("No validation data were given, so the last epoch was kept.")
        return tuple(notes)

    def _identity(self, about: Mapping[str, Any]) -> dict[str, Any]:
        seen = {"model": digest(self._tensors()), "masks": digest(dict(self.masks))}
        seen |= {"data": identity(self.data, self.how.seed)}
        if self.judge is not None:
            seen |= {"validation": self.judge.identity()}
        return seen | dict(about) | self.how.describe()

    def _write(self) -> None:
        if self.path is None:
            return
        tensors, plain = states.generators()
        moments, optimizer = states.optimizer_state(self.optimizer)
        tensors |= moments
        tensors |= {f"model.{name}": tensor for name, tensor in self._tensors().items()}
        tensors |= {f"good.{name}": tensor for name, tensor in self.good.items()}
        counts = {key: getattr(self, key) for key in _COUNTS}
        history = [
            {
                "number": e.number,
                "steps": e.steps,
                "seconds": e.seconds,
                "found": [m.to_dict() for m in e.measurements],
            }
            for e in self.history
        ]
        rest = {"about": self.about, "counts": counts, "losses": self.losses, "history": history}
        if self.pruner is not None:
            inside, rest["pruner"] = states.taken_apart(self.pruner.state_dict())
            tensors |= inside
        states.write_state(self.path, tensors, {**rest, "optimizer": optimizer, "generators": plain})

    def _begun(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What a checkpoint of this very run holds, before anything is touched; None where there is none."""
        if self.path is None or not self.path.exists():
            return None
        tensors, plain = states.read_state(self.path)
        states.check_same(self.path, plain.get("about", {}), self.about)
        return tensors, plain

    def _resume(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        try:
            for key in _COUNTS:
                setattr(self, key, plain["counts"][key])
            self.losses = list(plain["losses"])
            self.history = [_epoch(entry) for entry in plain["history"]]
            states.load_optimizer_(self.optimizer, tensors, plain["optimizer"])
            with torch.no_grad():
                for name, tensor in self._tensors().items():
                    tensor.copy_(tensors[f"model.{name}"])
                    self.good[name].copy_(tensors[f"good.{name}"])
            self.resume_from = {"tensors": tensors, "generators": plain["generators"]}
            pruned = None if self.pruner is None else states.put_together(tensors, plain["pruner"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{self.path}: this checkpoint was altered ({type(error).__name__}: {error}); delete it to start anew"
            ) from error
        if self.pruner is not None:
            self.pruner.load_state_dict(pruned)
        self.how.tell(self.label, self.step, self.steps)


_COUNTS = ("step", "epoch", "place", "since", "best", "value")


def _epoch(entry: Mapping[str, Any]) -> Epoch:
    found = tuple(Measurement.from_dict(m) for m in entry["found"])
    return Epoch(entry["number"], entry["steps"], found, entry["seconds"])


def _optimizer(whole: nn.Module, how: Training) -> torch.optim.Optimizer:
    named = {n: p for n, p in whole.named_parameters() if p.requires_grad and p.is_floating_point()}
    for name, parameter in named.items():
        check_apart(name, parameter)
    trained = list(named.values())
    if not trained:
        raise UsageError(
            "no parameter needs a gradient, so there is nothing to train; call requires_grad_(True)"
        )
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": how.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made = (how.optimizer or torch.optim.AdamW)(groups, lr=how.rate)
    made.zero_grad()
    return made


def _shown(loss: Any) -> str:
    return f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
