"""The job of `secateur inspect --sensitivity`: data for any model, a journal that survives, a table and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur import data, own, report
from secateur.errors import UsageError, nearest
from secateur.folder import write_json
from secateur.measure import Tell, running_on
from secateur.model import Loaded
from secateur.recipes import METHODS
from secateur.request import spec_name
from secateur.sensitivity import Journal, identity, sensitivity
from secateur.sources import writes_text

__all__ = ["Wanted", "analyse"]


@dataclass(frozen=True)
class Wanted:
    """What was asked for; see the options of `secateur inspect`."""

    measure: str = "kl"
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    method: str = "magnitude"
    data: str | None = None
    samples: int = 16
    context: int = 128
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method!r} is not known; {nearest(self.method, METHODS)}")


def analyse(loaded: Loaded, wanted: Wanted, folder: Path | None, tell: Tell) -> report.Sensitivity:
    """Measure, going on where an interrupted analysis of this folder stopped, and write what was found.

    Args:
        loaded: the model.
        wanted: what to measure.
        folder: where the result goes; None for nowhere, and then nothing can be resumed.
        tell: progress.

    Raises:
        UsageError: data of a kind that the model does not take, or a journal of another analysis.
    """
    recipe, batches = METHODS[wanted.method], _batches(loaded, wanted)
    journal = None
    if folder is not None:
        state = folder / "run" / "state"
        state.mkdir(parents=True, exist_ok=True)
        journal = Journal(
            state / "sensitivity.jsonl", identity(loaded.fingerprint, batches, wanted.measure, recipe)
        )
    with running_on("the data of the analysis"):
        found = sensitivity(
            loaded.model,
            batches,
            measure=wanted.measure,
            sparsities=wanted.sparsities,
            recipe=recipe,
            only=list(wanted.only) or None,
            skip=list(wanted.skip) or None,
            journal=journal,
            tell=tell,
        )
    if folder is not None:
        _write(folder, spec_name(loaded.spec), found, wanted)
    return found


def _write(folder: Path, name: str, found: report.Sensitivity, wanted: Wanted) -> None:
    write_json(
        folder / "sensitivity.json",
        {
            "model": name,
            "method": wanted.method,
            "quantity": found.quantity,
            "dense": found.reference,
            "sparsities": list(found.sparsities),
            "layers": dict(found.layers),
        },
    )
    html = report.page(
        name,
        summary=f"What the sparsity of each of {len(found.layers)} layers alone costs, cut by {wanted.method}.",
        sensitivity=found,
    )
    report.write(folder / "report.html", html)


def _batches(loaded: Loaded, wanted: Wanted) -> list[Any]:
    given = wanted.data
    if given is not None and own.is_own(given):
        return data.read_batches(given, seed=wanted.seed, limit=wanted.samples)
    if loaded.tokenizer is None or not writes_text(loaded.model):
        raise UsageError(
            "this model is no causal language model with a tokenizer; give batches with --data file.py:function"
        )
    texts = data.read_text(given or data.PYTHON_DOCS)
    return data.tokens(
        texts,
        loaded.tokenizer,
        context=wanted.context,
        samples=wanted.samples,
        seed=wanted.seed,
        batch=8,
        model=loaded.model,
    )
