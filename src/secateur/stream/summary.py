"""What is written beside the weights: the source's other files, the card, and everything under run/."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from secateur import __version__
from secateur.card import code, plain
from secateur.checkpoint import Checkpoint
from secateur.core.digest import digest
from secateur.folder import write_json, write_text
from secateur.request import spec_name
from secateur.results import SPECS, without_path
from secateur.stream.journal import Journal
from secateur.stream.tensors import Work

__all__ = ["copied_files", "facts_of", "write_summary"]


def facts_of(checkpoint: Checkpoint, work: Work, batches: Iterable[Any] | None) -> dict[str, Any]:
    """Everything that decides the bytes of the result; a resume must have the same."""
    return {
        "version": __version__,
        "torch": version("torch"),
        "transformers": None if batches is None else version("transformers"),
        "recipe": repr(work.todo.recipe.describe()),
        "layers": hashlib.sha256("\n".join(layer.name for layer in work.todo.layers).encode()).hexdigest(),
        "weights kept": work.todo.keep,
        "nonzero": work.nonzero,
        "seed": work.seed,
        "data": None if batches is None else digest(batches),
        "threads": None if batches is None else torch.get_num_threads(),  # sums of products round by them
        "source": dict(sorted(checkpoint.files.items())),
    }


def copied_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Config, tokenizer and index as they are; weight files are written already."""
    weights = {path.name for path in checkpoint.weights}
    for name in checkpoint.files:
        if name not in weights:
            shutil.copyfile(checkpoint.folder / name, folder / name)


def write_summary(
    checkpoint: Checkpoint,
    work: Work,
    journal: Journal,
    folder: Path,
    notes: Sequence[str],
    settings: Mapping[str, Any] | None,
) -> int:
    """Write README.md and everything under run/ but the masks; the number of pruned weights.

    Nothing that changes from run to run is written, so that a resumed run gives the same bytes.
    """
    pruned = sum(journal.done[layer.name]["pruned"] for layer in work.todo.layers)
    write_json(folder / "run" / "layers.json", _layers(work, journal))
    write_json(
        folder / "run" / "run.json",
        {
            "secateur": __version__,
            "torch": version("torch"),
            "streamed": True,
            "recipe": work.todo.recipe.describe(),
            "seed": work.seed,
            "weights": work.todo.size,
            "pruned": pruned,
            "source": {"sha256": checkpoint.fingerprint, "files": checkpoint.files},
            "notes": list(notes),
        },
    )
    if journal.asked is not None:
        write_text(folder / "run" / "recipe.yaml", _yaml(journal.asked))
        write_text(
            folder / "run" / "recipe.resolved.yaml",
            _yaml(_resolved(work, {**(settings or {}), **journal.asked})),
        )
    write_text(folder / "README.md", _card(checkpoint, work, pruned, notes))
    return pruned


def _layers(work: Work, journal: Journal) -> list[dict[str, Any]]:
    chosen = [
        {
            "name": layer.name,
            "role": layer.role,
            "shape": list(layer.weight.shape),
            "weights": layer.size,
            **journal.done[layer.name],
        }
        for layer in work.todo.layers
    ]
    left = [{"name": layer.name, "role": layer.role, "left out": why} for layer, why in work.todo.left_out]
    left += [{"name": name, "left out": why} for name, why in work.todo.unprunable]
    return [*chosen, *left]


def _resolved(work: Work, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The request with every default, and what it resolved to; no path of this machine."""
    todo = work.todo
    told = {
        key: without_path(key, value) if key in SPECS and value else value for key, value in settings.items()
    }
    told["resolved"] = {
        **todo.recipe.describe(),
        "layers": [layer.name for layer in todo.layers],
        "weights": todo.size,
        "weights kept": todo.keep,
        "statistics": list(todo.statistics),
    }
    return told


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def _card(checkpoint: Checkpoint, work: Work, pruned: int, notes: Sequence[str]) -> str:
    size = work.todo.size
    lines = [
        f"# {code(spec_name(str(checkpoint.folder)))}, pruned",
        "",
        f"{pruned:,} of {size:,} weights in {len(work.todo.layers)} layers are zero (sparsity {pruned / size:.4f} of "
        f"these layers), cut by secateur {__version__}: {plain(str(work.todo))}.",
        "",
        "The checkpoint was pruned from file to file and not measured: `secateur evaluate` measures it.",
        "",
        "The zeros are stored as ordinary numbers: files have the names, order, types and size of the source's. Masks",
        "are in `run/masks.safetensors`, one bit a weight.",
        *(f"\nNote: {plain(note)}." for note in notes),
    ]
    if hasattr(work.model, "config"):  # no stand-in
        name = f"{type(work.model).__name__}.from_pretrained(folder)"
        lines += ["", f"Load it with transformers, nothing else needed: {code(name)}."]
    return "\n".join(lines) + "\n"
