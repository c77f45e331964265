"""What an experiment leaves: the model, its masks and its card."""

from __future__ import annotations

from pathlib import Path

from secateur import model as models
from secateur.card import code, plain
from secateur.evaluate import Measurement
from secateur.folder import write_text
from secateur.pipeline.records import Journal, public
from secateur.pipeline.subject import Subject
from secateur.request import spec_name
from secateur.run import stored_dtype

__all__ = ["write_output"]


def write_output(subject: Subject, journal: Journal, folder: Path) -> None:
    """Write the model, the masks and README.md into the experiment's folder."""
    loaded = subject.loaded
    models.save(loaded.model, loaded.tokenizer, folder, source=loaded.folder, dtype=stored_dtype(loaded))
    if subject.masks:
        subject.masks.save(folder / "run" / "masks.safetensors")
    write_text(folder / "README.md", _card(subject, journal))


def _card(subject: Subject, journal: Journal) -> str:
    """Markdown: what was done, and what was measured after each stage."""
    found = [[Measurement.from_dict(m) for m in record["measurements"]] for record in journal.records]
    heads = [f"{record['stage']} {record['name']}" for record in journal.records]
    names = list(dict.fromkeys(m.name for each in found for m in each))
    rows = []
    for name in names:
        cells = [next((_value(m) for m in each if m.name == name), "") for each in found]
        rows.append("| " + " | ".join([plain(name), *cells]) + " |")
    asked = [f"{stage}" for stage in public(subject.experiment)["stages"]]
    return "\n".join(
        [
            f"# {code(spec_name(subject.loaded.spec))}, after an experiment",
            "",
            f"Stages: {'; '.join(code(each) for each in asked)}.",
            "",
            "| measurement | " + " | ".join(heads) + " |",
            "|---|" + "---|" * len(heads),
            *rows,
            "",
            "Conditions of every measurement, masks and settings are in `run/`.",
            "",
        ]
    )


def _value(measured: Measurement) -> str:
    return f"{measured.value:,}" if isinstance(measured.value, int) else f"{measured.value:.4g}"
