"""The README.md of a pruned checkpoint: what was done, what it cost, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from secateur import __version__
from secateur.core.masks import Masks
from secateur.deploy import Shrunk
from secateur.evaluate import Measurement
from secateur.model import Loaded
from secateur.request import spec_name

__all__ = ["code", "depth_card", "model_card", "plain", "shrunk_card"]


def model_card(
    loaded: Loaded, plan: str, measurements: Mapping[str, Sequence[Measurement]], masks: Masks
) -> str:
    """Markdown with one table of all measurements; names from outside can neither leave their place nor be HTML."""
    lines = [
        f"# {code(spec_name(loaded.spec))}, pruned",
        "",
        f"{masks.zeros:,} of {masks.size:,} weights in {len(masks)} layers are zero "
        f"(sparsity {masks.sparsity:.4f} of these layers), cut by secateur {__version__}: {plain(plan)}.",
        "",
        *_table(measurements),
        "",
        "The zeros are stored as ordinary numbers: files and speed are those of the dense model until the sparsity is",
        "put to use. Masks, exact conditions of every measurement and the report are in `run/`.",
        "",
        _loading(loaded),
    ]
    return "\n".join(lines) + "\n"


def depth_card(loaded: Loaded, said: str, measurements: Mapping[str, Sequence[Measurement]]) -> str:
    """The same for a model that lost whole blocks: nothing is zero, everything is smaller."""
    lines = [
        f"# {code(spec_name(loaded.spec))}, with fewer blocks",
        "",
        f"Made by secateur {__version__}: {plain(said)}.",
        "",
        *_table(measurements),
        "",
        "Exact conditions of every measurement and the report are in `run/`.",
        "",
        _loading(loaded),
    ]
    return "\n".join(lines) + "\n"


def shrunk_card(
    loaded: Loaded, form: str, note: Shrunk, measurements: Mapping[str, Sequence[Measurement]], plan: str = ""
) -> str:
    """The same for a model whose pruned units are gone."""
    said = str(note).splitlines()
    lines = [
        f"# {code(spec_name(loaded.spec))}, smaller",
        "",
        f"{plain(said[0])}, made by secateur {__version__}; {plain(said[-1])}.",
        "",
        *([f"Cut by {plain(plan)}.", ""] if plan else []),
        *(f"* {plain(line)}" for line in said[1:-1]),
        "",
        *_table(measurements),
        "",
        "Exact conditions of every measurement are in `run/`.",
        "",
        _loading_compact(loaded) if form == "compact" else _loading(loaded),
    ]
    return "\n".join(lines) + "\n"


def _loading_compact(loaded: Loaded) -> str:
    more = ", " + repr(spec_name(loaded.spec).partition("@")[0]) if loaded.kind == "python" else ""
    return f"Load it with {code(f'secateur.load(folder{more})')}: the layers' widths are in {code('compact.json')}."


def _table(measurements: Mapping[str, Sequence[Measurement]]) -> list[str]:
    names = list(dict.fromkeys(m.name for found in measurements.values() for m in found))
    lines = ["| measurement | " + " | ".join(measurements) + " |", "|---|" + "---|" * len(measurements)]
    for name in names:
        cells = [next((str(m) for m in found if m.name == name), "") for found in measurements.values()]
        lines.append("| " + " | ".join(plain(cell.removeprefix(f"{name} ")) for cell in [name, *cells]) + " |")
    return lines


def _loading(loaded: Loaded) -> str:
    if loaded.kind == "python":
        spec = spec_name(loaded.spec).partition("@")[0] + "@FOLDER/model.safetensors"
        return f"Load it with {code(f'secateur.model.load({spec!r})')}, where FOLDER is this one."
    name = type(loaded.model).__name__
    return f"Load it with transformers, nothing else needed: {code(f'{name}.from_pretrained(folder)')}."


def code(text: str) -> str:
    """Code in Markdown, whatever stands in it."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def plain(text: str) -> str:
    """Text that Markdown and HTML take as it is, in one line."""
    return re.sub(r"([\\`*\[\]|<&])", r"\\\1", " ".join(text.split()))
