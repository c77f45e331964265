"""The README.md of a pruned checkpoint: what was done, what it cost, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur import __version__
from secateur.core.masks import Masks
from secateur.evaluate import Measurement
from secateur.request import PruneRequest, spec_name

__all__ = ["model_card"]


def model_card(
    asked: PruneRequest, plan: str, measurements: Mapping[str, Sequence[Measurement]], masks: Masks
) -> str:
    """Markdown with one table of all measurements; names from outside are quoted as code."""
    name = spec_name(asked.model)
    lines = [
        f"# {_code(name)}, pruned",
        "",
        f"{masks.zeros:,} of {masks.size:,} weights in {len(masks)} layers are zero "
        f"(sparsity {masks.sparsity:.4f} of these layers), cut by secateur {__version__}: {plan}.",
        "",
        "| measurement | " + " | ".join(measurements) + " |",
        "|---|" + "---|" * len(measurements),
        *_rows(measurements),
        "",
        "The zeros are stored as ordinary numbers: files and speed are those of the dense model until the sparsity is",
        "put to use. Masks, exact conditions of every measurement and the report are in `run/`.",
        "",
        *_loading(asked),
    ]
    return "\n".join(lines) + "\n"


def _rows(measurements: Mapping[str, Sequence[Measurement]]) -> list[str]:
    names = list(dict.fromkeys(m.name for found in measurements.values() for m in found))
    rows = []
    for name in names:
        cells = [next((str(m) for m in found if m.name == name), "") for found in measurements.values()]
        rows.append("| " + " | ".join([name, *(_cell(cell.removeprefix(f"{name} ")) for cell in cells)]) + " |")
    return rows


def _loading(asked: PruneRequest) -> list[str]:
    if ".py:" in asked.model:
        spec = f"{spec_name(asked.model).partition('@')[0]}@model.safetensors"
        return [f"Load it with `secateur.model.load({spec!r})`."]
    return ["Load it with `transformers`, nothing of ours needed: `AutoModel.from_pretrained(folder)`."]


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
