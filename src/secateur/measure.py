"""What is measured of a model before and after pruning, and which text it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur import evaluate
from secateur.evaluate import Measurement

__all__ = ["Yardstick", "compare_speed", "measure", "same_predictions"]

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Yardstick:
    """What a model is judged by.

    Attributes:
        text: token ids of held-out text, None for a model that reads no text.
        text_name: what that text is called.
        labelled: batches `(inputs, labels)` for accuracy and F1, None without.
        labelled_name: what they are called.
        example: one input for FLOPs and latency, None where nothing gives one.
        context: tokens in one window; None: the model's own.
        tell: called with a label, steps done and steps in all.
    """

    text: torch.Tensor | None = None
    text_name: str = ""
    labelled: Sequence[Any] | None = None
    labelled_name: str = ""
    example: Any = None
    context: int | None = None
    tell: Tell = field(default=lambda label, done, total: None)

    def progress(self, label: str) -> Callable[[int, int], None]:
        """A two-argument callback for one task."""
        return lambda done, total: self.tell(label, done, total)


def measure(model: nn.Module, by: Yardstick) -> list[Measurement]:
    """Quality and size of one model; speed is measured in pairs, by `compare_speed`."""
    found: list[Measurement] = []
    if by.text is not None:
        found.append(
            evaluate.perplexity(
                model, by.text, dataset=by.text_name, context=by.context, progress=by.progress("perplexity")
            )
        )
    if by.labelled is not None:
        predictions = evaluate.predict(model, by.labelled, dataset=by.labelled_name)
        found += [evaluate.accuracy(predictions), *_f1(predictions)]
    found += [evaluate.parameters(model), evaluate.nonzeros(model), evaluate.state_bytes(model)]
    if by.example is not None:
        counted = evaluate.flops(model, by.example, effective=True)
        found += [counted["macs"], counted["effective_macs"]]
    return found


def _f1(predictions: evaluate.Predictions) -> list[Measurement]:
    """F1 where scikit-learn is there; accuracy alone needs nothing more."""
    from importlib.util import find_spec

    return [evaluate.f1(predictions)] if find_spec("sklearn") else []


def same_predictions(model: nn.Module, dense: nn.Module, by: Yardstick) -> list[Measurement]:
    """KL divergence and top-1 agreement with the dense model on the held-out text; nothing without text."""
    if by.text is None:
        return []
    found = evaluate.divergence(
        model,
        dense,
        by.text,
        dataset=by.text_name,
        context=by.context,
        progress=by.progress("comparison with dense"),
    )
    return list(found.values())


def compare_speed(
    models: Mapping[str, nn.Module], by: Yardstick, repeats: int = 15
) -> dict[str, list[Measurement]]:
    """Latency of each model, measured in turns with the first as control, and the speed-up over it."""
    if by.example is None:
        return {name: [] for name in models}
    by.tell("latency", 0, 1)
    paired = evaluate.paired_latency(models, by.example, repeats=repeats)
    by.tell("latency", 1, 1)
    found = {name: [paired.latency[name]] for name in models}
    for name, speedup in paired.speedup.items():
        found[name].append(speedup)
    return found
