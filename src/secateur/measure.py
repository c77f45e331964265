"""What is measured of a model before and after pruning, and which text or batches it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import evaluate
from secateur.core.misfit import MisfitError
from secateur.errors import ResourceError, SecateurError, UsageError
from secateur.evaluate import Measurement, Predictions

__all__ = [
    "Tell",
    "Yardstick",
    "answers",
    "compare_speed",
    "counted",
    "measure",
    "running_on",
    "same_answers",
    "same_predictions",
    "weight_files",
]

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


@contextmanager
def running_on(what: str) -> Iterator[None]:
    """Tell an exception of the model's own forward pass as one line: these inputs do not fit this model.

    Raises:
        UsageError: the model raised something.
        ResourceError: it ran out of memory.
    """
    try:
        yield
    except MisfitError as error:
        raise UsageError(
            f"the model cannot be run on {what} ({error.reason}); do they fit together?"
        ) from error
    except (SecateurError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "allocate memory" in reason or "out of memory" in reason:
            raise ResourceError(f"the model runs out of memory on {what} ({reason})") from error
        raise UsageError(f"the model cannot be run on {what} ({reason}); do they fit together?") from error


def counted(batches: Sequence[Any], label: str, tell: Tell) -> Iterator[Any]:
    """The batches one by one, telling how far we are."""
    for done, batch in enumerate(batches):
        tell(label, done, len(batches))
        yield batch
    tell(label, len(batches), len(batches))


def answers(model: nn.Module, by: Yardstick) -> Predictions | None:
    """What the model says to the labelled batches; None without such batches."""
    if by.labelled is None:
        return None
    with running_on(f"the batches of {by.labelled_name}"):
        batches = counted(by.labelled, "predictions", by.tell)
        return evaluate.predict(model, batches, dataset=by.labelled_name)


def measure(model: nn.Module, by: Yardstick, predictions: Predictions | None = None) -> list[Measurement]:
    """Quality and size of one model; speed is measured in pairs, by `compare_speed`.

    Args:
        model: any model.
        by: what it is judged by.
        predictions: what `answers` returned for it.
    """
    found: list[Measurement] = []
    if by.text is not None:
        found.append(
            evaluate.perplexity(
                model, by.text, dataset=by.text_name, context=by.context, progress=by.progress("perplexity")
            )
        )
    if predictions is not None:
        found += [evaluate.accuracy(predictions), *_f1(predictions)]
    found += [evaluate.parameters(model), evaluate.nonzeros(model), evaluate.state_bytes(model)]
    if by.example is not None:
        with running_on("the example input"):
            flops = evaluate.flops(model, by.example, effective=True)
        found += [flops["macs"], flops["effective_macs"]]
    return found


def _f1(predictions: Predictions) -> list[Measurement]:
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
        progress=by.progress("comparison with the dense model"),
    )
    return list(found.values())


def same_answers(mine: Predictions | None, dense: Predictions | None) -> list[Measurement]:
    """How often a classifier says what the dense one says, whatever the labels are; nothing without answers."""
    if mine is None or dense is None:
        return []
    if mine.predicted.shape != dense.predicted.shape:
        raise UsageError(
            f"the models answer in different shapes ({tuple(mine.predicted.shape)} and "
            f"{tuple(dense.predicted.shape)}), so their answers cannot be compared"
        )
    same = mine.predicted == dense.predicted
    share = float((same.all(-1) if same.dim() > 1 else same).double().mean())
    return [Measurement("top1_agreement", share, "1", mine.conditions)]


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


def weight_files(place: Path) -> list[Measurement]:
    """Bytes of a weight file, or of all that lie in a checkpoint's folder itself; masks below do not count."""
    if place.is_file():
        return [
            Measurement(
                "disk_bytes", place.stat().st_size, "bytes", {"files": 1, "pattern": f"*{place.suffix}"}
            )
        ]
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(path for path in place.glob(pattern) if path.is_file())
        if files:
            size = sum(path.stat().st_size for path in files)
            return [Measurement("disk_bytes", size, "bytes", {"files": len(files), "pattern": pattern})]
    return []
