"""How a model is trained, and what training came to: options and results that fine-tuning and distillation
share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from secateur.core.masks import Masks
from secateur.errors import UsageError, nearest
from secateur.measurement import Measurement

__all__ = ["Epoch", "Judge", "Options", "Training", "Tuned", "name_of", "training"]

Tell = Callable[[str, int, int], None]
DECAYS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
HIGHER = {"accuracy", "f1", "rouge1", "rouge2", "rougeL", "top1_agreement"}
LOWER = {"loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "kl_divergence"}
USUAL_RATE = 1e-3  # AdamW's own default, taken for the original learning rate where nobody says what it was


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


class Options(TypedDict, total=False):
    """Keywords of everything that trains; see `Training`."""

    epochs: int
    lr: float | None
    original_lr: float | None
    warm_up: float
    decay: Literal["cosine", "linear", "constant"]
    weight_decay: float
    clip: float | None
    accumulate: int
    autocast: Literal["bfloat16"] | None
    patience: int | None
    optimizer: Callable[..., torch.optim.Optimizer] | None
    seed: int
    checkpoint: str | Path | None
    every: int | None
    tell: Tell


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        epochs: passes over the data, at most.
        lr: peak learning rate. None: a tenth of `original_lr`.
        original_lr: the peak rate that the dense model was trained with; None where nobody knows, then 1e-3,
            AdamW's own default, is taken for it and the result says so.
        warm_up: fraction of all steps in which the rate grows linearly from zero, in [0, 1).
        decay: how it falls after that: along a cosine to zero, linearly to zero, or not at all.
        weight_decay: of matrices and larger; vectors (biases, norms) have none.
        clip: largest norm of all gradients together; None for no limit.
        accumulate: batches whose gradients make one step, each counting the same.
        autocast: "bfloat16": forward passes in half precision, weights and steps in their own.
        patience: epochs without a better validation that are borne before training stops; None for no limit.
        optimizer: `(parameter groups, lr=...) -> Optimizer`; None for AdamW.
        seed: of the order of batches, of dropout, and of everything else that draws; the generators are as before
            afterwards.
        checkpoint: a file that is written after every epoch; where it is there already, training goes on from it,
            with the same result as if it had never stopped.
        every: also after so many steps.
        tell: progress `(label, done, total)`.
    """

    epochs: int = 3
    lr: float | None = None
    original_lr: float | None = None
    warm_up: float = 0.1
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.01
    clip: float | None = 1.0
    accumulate: int = 1
    autocast: Literal["bfloat16"] | None = None
    patience: int | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    seed: int = 0
    checkpoint: str | Path | None = None
    every: int | None = None
    tell: Tell = _silent

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (self.lr is None or 0 < self.lr < math.inf, "above 0"),
            "original_lr": (self.original_lr is None or 0 < self.original_lr < math.inf, "above 0"),
            "warm_up": (0 <= self.warm_up < 1, "in [0, 1)"),
            "decay": (self.decay in DECAYS, f"one of {', '.join(DECAYS)}"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "clip": (self.clip is None or self.clip > 0, "above 0, or None"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "autocast": (self.autocast in (None, "bfloat16"), "bfloat16 or None"),
            "patience": (self.patience is None or self.patience >= 0, "at least 0, or None"),
            "every": (self.every is None or self.every >= 1, "at least 1, or None"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def rate(self) -> float:
        """The peak learning rate in force."""
        return self.lr if self.lr is not None else (self.original_lr or USUAL_RATE) / 10

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result has to know."""
        if self.lr is not None or self.original_lr is not None:
            return ()
        return (
            f"The original learning rate is not known; {self.rate:g}, a tenth of AdamW's default, was used. Give "
            "original_lr= or lr=.",
        )

    def at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of so many."""
        warm = round(self.warm_up * steps)
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * DECAYS[self.decay]((step - warm) / max(1, steps - warm))

    def describe(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        left_out = ("checkpoint", "every", "tell", "optimizer")
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return said | {"optimizer": "AdamW" if self.optimizer is None else name_of(self.optimizer)}


def training(**options: Any) -> Training:
    """Options by keyword, checked.

    Raises:
        UsageError: an unknown keyword, or a value out of range.
    """
    known = [f.name for f in fields(Training)]
    for name in options:
        if name not in known:
            raise UsageError(f"{name}= is no option of training; {nearest(name, known)}")
    return Training(**options)


def name_of(function: Any) -> str:
    """What a function is called in a record: its name, or that of its class."""
    function = getattr(function, "func", function)  # out of functools.partial
    return getattr(function, "__qualname__", None) or type(function).__qualname__


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        number: from 1; 0 is the model before training.
        steps: of the optimizer, by its end.
        measurements: mean training loss of the epoch, and what validation says at its end.
        seconds: it took.
    """

    number: int
    steps: int
    measurements: tuple[Measurement, ...]
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Tuned:
    """What training came to; the model has the weights of epoch `best`.

    Attributes:
        history: epoch by epoch, the state before training first where there are validation data.
        best: the epoch whose weights the model has: the best by validation, the last without validation data.
        steps: steps of the optimizer.
        lr: the peak learning rate.
        stopped: why it ended.
        notes: sentences that a reader of the result needs.
        masks: what is pruned in the end.
    """

    history: tuple[Epoch, ...]
    best: int
    steps: int
    lr: float
    stopped: str
    notes: tuple[str, ...] = ()
    masks: Masks = field(default_factory=lambda: Masks({}), repr=False)

    def __str__(self) -> str:
        last = next((epoch for epoch in self.history if epoch.number == self.best), None)
        said = "; ".join(str(m) for m in last.measurements) if last else "not measured"
        return f"epoch {self.best} of {self.history[-1].number} kept: {said} ({self.stopped})"


@dataclass(frozen=True)
class Judge:
    """What a model is judged by after each epoch.

    Attributes:
        measure: no arguments; gives the Measurement.
        better: "higher" or "lower"; None goes by the measurement's name.
        identity: gives its name and the digest of the data that it looks at.
    """

    measure: Callable[[], Measurement]
    better: str | None = None
    identity: Callable[[], str] = str

    def higher(self, found: Measurement) -> bool:
        """Whether more of what was measured is better.

        Raises:
            UsageError: neither `better` nor the name says.
        """
        if self.better is None and found.name not in HIGHER | LOWER:
            raise UsageError(f'is more {found.name} better, or less? Say better="higher" or better="lower"')
        return found.name in HIGHER if self.better is None else self.better == "higher"
