"""What an experiment leaves: the model, its masks and its card."""

from __future__ import annotations

from pathlib import Path

from secateur import model as models
from secateur.card import code, plain
from secateur.deploy import load_quantized_, save_quantized
from secateur.evaluate import Measurement
from secateur.folder import write_text
from secateur.pipeline.records import Journal, public
from secateur.pipeline.spec import Export
from secateur.pipeline.subject import Subject
from secateur.request import spec_name
from secateur.run import stored_dtype

__all__ = ["QUANTIZED", "write_output"]

QUANTIZED = "quantized.safetensors"


def write_output(subject: Subject, journal: Journal, folder: Path) -> None:
    """Write the model, the masks and README.md into the experiment's folder."""
    loaded = subject.loaded
    models.save(loaded.model, loaded.tokenizer, folder, source=loaded.folder, dtype=stored_dtype(loaded))
    if subject.quantization is not None:
        _as_integers(subject, folder)
    if subject.masks:
        subject.masks.save(folder / "run" / "masks.safetensors")
    write_text(folder / "README.md", _card(subject, journal, folder))


def _as_integers(subject: Subject, folder: Path) -> None:
    """Put integers in the place of the weight files; or, where a checkpoint is asked for, the weights as rounded."""
    wanted = [stage.settings.to for stage in subject.experiment.stages if isinstance(stage.settings, Export)]
    model, _ = subject.quantized()
    save_quantized(model, folder / QUANTIZED)
    if wanted[-1:] == ["checkpoint"]:
        loaded = subject.loaded
        load_quantized_(loaded.model, folder / QUANTIZED, dense=True)
        models.save(loaded.model, loaded.tokenizer, folder, source=loaded.folder, dtype=stored_dtype(loaded))
        (folder / QUANTIZED).unlink()
        return
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        if path.name != QUANTIZED:
            path.unlink()


def _loading(subject: Subject) -> str:
    """How integers are loaded."""
    how = code(f"secateur.load_quantized_(model, 'FOLDER/{QUANTIZED}')")
    return (
        f"The weights are integers in {code(QUANTIZED)}: build the model from its config or code, and fill it with "
        f"{how} (needs torchao), or with `dense=True` for ordinary weights (needs nothing)."
    )


def _card(subject: Subject, journal: Journal, folder: Path) -> str:
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
            *([_loading(subject), ""] if (folder / QUANTIZED).exists() else []),
            "Conditions of every measurement, masks and settings are in `run/`.",
            "",
        ]
    )


def _value(measured: Measurement) -> str:
    return f"{measured.value:,}" if isinstance(measured.value, int) else f"{measured.value:.4g}"
