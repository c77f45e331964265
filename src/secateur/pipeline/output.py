"""What an experiment leaves: the model, its masks and its card."""

from __future__ import annotations

from pathlib import Path

from secateur import model as models
from secateur.card import code, plain
from secateur.checkpoint import INTEGERS
from secateur.compact import is_compact, open_compact, write_instead
from secateur.deploy import load_quantized_, save_quantized
from secateur.evaluate import Measurement
from secateur.folder import write_text
from secateur.pipeline.records import Journal, public
from secateur.pipeline.spec import Export
from secateur.pipeline.subject import Subject
from secateur.request import spec_name
from secateur.run import stored_dtype

__all__ = ["TIMES", "write_output"]

TIMES = "A speedup was timed in turns with the loaded model; latencies of different stages are of different moments."


def write_output(subject: Subject, journal: Journal, folder: Path) -> None:
    """Write the model, the masks and README.md into the experiment's folder."""
    _save(subject, folder)
    if subject.quantization is not None:
        _as_integers(subject, folder)
    if subject.masks:
        subject.masks.save(folder / "run" / "masks.safetensors")
    write_text(folder / "README.md", _card(subject, journal, folder))


def _save(subject: Subject, folder: Path) -> None:
    """The model with ordinary weights; where units went, plain if a config can say it, else compact."""
    loaded = subject.loaded
    options = {"source": loaded.folder, "dtype": stored_dtype(loaded)}
    made_from = {"name": spec_name(loaded.spec), "sha256": loaded.fingerprint}
    models.save(loaded.model, loaded.tokenizer, folder, made_from=made_from, **options)  # type: ignore[arg-type]


def _as_integers(subject: Subject, folder: Path) -> None:
    """Put integers in the place of the weight files; or, where a checkpoint is asked for, the weights as rounded."""
    wanted = [stage.settings.to for stage in subject.experiment.stages if isinstance(stage.settings, Export)]
    model, _ = subject.quantized()
    save_quantized(model, folder / INTEGERS)
    if wanted[-1:] == ["checkpoint"]:
        load_quantized_(subject.model, folder / INTEGERS, dense=True)
        _save(subject, folder)
        (folder / INTEGERS).unlink()
        return
    if is_compact(folder):
        write_instead(folder, folder / INTEGERS)
        return
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        if path.name != INTEGERS:
            path.unlink()


def _loading(subject: Subject, folder: Path) -> str:
    """How what is no plain checkpoint is loaded."""
    build = ", build" if is_compact(folder) and not open_compact(folder).pretrained else ""
    small = code(f"secateur.load('FOLDER'{build})")
    if not (folder / INTEGERS).exists():
        return f"The widths are smaller than a config can say: load the model with {small}."
    if is_compact(folder):
        return (
            f"The weights are integers in {code(INTEGERS)}, of a model with units taken out: {small} gives it with "
            f"ordinary weights, and {code(f'secateur.load_quantized_(model, {INTEGERS!r})')} puts the integers in "
            "(needs torchao)."
        )
    own = "" if subject.loaded.kind == "transformers" else ", build"
    dense = code(f"secateur.load('FOLDER'{own})")
    how = code(f"secateur.load_quantized_(model, 'FOLDER/{INTEGERS}')")
    return (
        f"The weights are integers in {code(INTEGERS)}: {dense} gives the model with the ordinary weights that they "
        f"stand for, and {how} puts the integers in (needs torchao)."
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
            *([_loading(subject, folder), ""] if (folder / INTEGERS).exists() or is_compact(folder) else []),
            *([TIMES, ""] if "speedup" in names else []),
            "Conditions of every measurement, masks and settings are in `run/`.",
            "",
        ]
    )


def _value(measured: Measurement) -> str:
    return f"{measured.value:,}" if isinstance(measured.value, int) else f"{measured.value:.4g}"
