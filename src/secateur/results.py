"""What a run's folder holds beside the checkpoint: measurements, layers, circumstances, the card, the report.

No path of this machine goes into any of it, but for `recipe.yaml`, which holds the request as it was typed so
that it can be run again.
"""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from secateur import __version__, evaluate, report
from secateur.apply import Applied
from secateur.card import model_card, shrunk_card
from secateur.core.counts import Sparsity, sparsity
from secateur.core.forward import dtype_of
from secateur.core.masks import Masks
from secateur.core.where import Layer
from secateur.deploy import shrunk
from secateur.evaluate import Measurement
from secateur.folder import write_json, write_text
from secateur.mixes import mix_name
from secateur.model import Loaded
from secateur.prune import Plan
from secateur.request import PruneRequest, cuts_units, pattern_of, spec_name

__all__ = [
    "SPECS",
    "Result",
    "as_csv",
    "as_yaml",
    "circumstances",
    "layer_lines",
    "without_path",
    "write_results",
]

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "plotly", "pydantic")
MASKS_BEFORE = "masks-before.safetensors"  # of a model whose units are gone: they fit the one before
SPECS = ("model", "data", "evaluate", "labelled")  # settings that may hold a path


def without_path(setting: str, spec: str) -> str:
    """What a setting that may hold a path, or for data several, is called in results."""
    return mix_name(spec) if setting in ("data", "train") else spec_name(spec)


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        measurements: by variant, `dense` and `pruned`.
        applied: what was pruned, and by which recipe.
        stages: histograms of the weights before and after.
        notes: sentences that a reader of the results needs.
        inputs: digests of the calibration data and of the text or batches judged by.
        seconds: of each step.
        small: the model without the units that went, None where there is none.
        form: in which that was written; "" where it was not.
    """

    measurements: dict[str, list[Measurement]]
    applied: Applied
    stages: tuple[report.Stage, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    small: nn.Module | None = None
    form: str = ""

    @property
    def masks(self) -> Masks:
        """Kept weights, True = kept."""
        return self.applied.masks


def layer_lines(todo: Plan, shown: int = 3) -> list[str]:
    """The layers that are left out, one line a reason, the first few by name."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in todo.left_out:
        by_reason.setdefault(reason, []).append(layer.name)
    for name, reason in (*todo.axes_left_out, *todo.unprunable):
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        lines.append(f"{', '.join(names[:shown])}{more}: {reason}")
    return lines


def write_results(asked: PruneRequest, loaded: Loaded, todo: Plan, result: Result, folder: Path) -> None:
    """Write README.md and everything under `run/` into a folder that holds the pruned checkpoint already."""
    counted, name = sparsity(loaded.model), spec_name(asked.model)
    plain = {variant: [m.to_dict() for m in found] for variant, found in result.measurements.items()}
    run = folder / "run"
    run.mkdir(exist_ok=True)
    result.masks.save(run / (MASKS_BEFORE if result.form else "masks.safetensors"))
    write_json(run / "metrics.json", plain)
    write_text(run / "results.csv", as_csv(plain))
    write_json(run / "layers.json", _layers(todo, result.masks, counted))
    write_text(run / "recipe.yaml", as_yaml(asked.model_dump(mode="json", exclude_unset=True)))
    write_text(run / "recipe.resolved.yaml", as_yaml(_resolved(asked, loaded, todo, result.applied)))
    write_json(run / "run.json", circumstances(asked, loaded, result.inputs, result.seconds))
    said = _said(todo, result.applied)
    if result.form and result.small is not None:
        card = shrunk_card(loaded, result.form, shrunk(result.small), result.measurements, said)
    else:
        card = model_card(loaded, said, result.measurements, result.masks)
    write_text(folder / "README.md", card)
    html = report.page(
        name,
        summary=_sentence(asked, result.applied),
        measurements=plain,
        layers=_rows(todo, counted),
        stages=result.stages,
        notes=[
            *result.notes,
            *result.applied.notes,
            *(f"Left as they are: {line}." for line in layer_lines(todo)),
        ],
    )
    report.write(run / "report.html", html)


def _said(todo: Plan, applied: Applied) -> str:
    """The plan, with what was done in place of what the search started from."""
    return str(todo).replace(str(todo.recipe), applied.said, 1)


def _sentence(asked: PruneRequest, applied: Applied) -> str:
    masks = applied.masks
    if cuts_units(asked):
        return (
            f"{masks.zeros:,} of {masks.size:,} numbers in {len(masks)} parameters of {spec_name(asked.model)} were "
            f"set to zero by {asked.method} ({applied.said}), in whole units. {' '.join(applied.notes)}"
        )
    return (
        f"{masks.zeros:,} of {masks.size:,} weights in {len(masks)} layers of {spec_name(asked.model)} were set to "
        f"zero by {asked.method} ({applied.said}): sparsity {masks.sparsity:.4f} of these layers."
    )


def _rows(todo: Plan, counted: Sparsity) -> list[report.LayerRow]:
    rows = []
    for layer in todo.touched:
        count = counted.layers[layer.name]
        rows.append(report.LayerRow(layer.name, tuple(layer.weight.shape), layer.role, count.size, count.zeros))
    return rows


def _layers(todo: Plan, masks: Masks, counted: Sparsity) -> list[dict[str, Any]]:
    chosen = [
        {
            "name": layer.name,
            "role": layer.role,
            "shape": list(layer.weight.shape),
            "weights": layer.size,
            "pruned": _pruned(layer, masks),
            "zeros": counted.layers[layer.name].zeros,
        }
        for layer in todo.touched
    ]
    left = [{"name": layer.name, "role": layer.role, "left out": reason} for layer, reason in todo.left_out]
    left += [{"name": name, "left out": reason} for name, reason in (*todo.axes_left_out, *todo.unprunable)]
    return [*chosen, *left]


def _pruned(layer: Layer, masks: Masks) -> int:
    """Weights of a layer that its mask takes, under whichever name a tied tensor has there."""
    mask = next((masks[name] for name in (layer.name, *layer.tied) if name in masks), None)
    return 0 if mask is None else mask.numel() - int(torch.count_nonzero(mask))


def _resolved(asked: PruneRequest, loaded: Loaded, todo: Plan, applied: Applied) -> dict[str, Any]:
    """The request with every default, and what it resolved to."""
    settings = asked.model_dump(mode="json")
    for key in SPECS:
        settings[key] = settings[key] and without_path(key, settings[key])
    settings["pattern"] = pattern_of(asked)
    settings["dtype"] = dtype_of(loaded.model)
    settings["resolved"] = {
        **applied.recipe.describe(),
        **applied.details,
        "layers": [layer.name for layer in todo.touched],
        "weights": todo.size,
        "weights kept": todo.keep,
        "statistics": list(todo.statistics),
    }
    return settings


def circumstances(
    asked: Any, loaded: Loaded, inputs: Mapping[str, str], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """What a result depends on beside the request: versions, machine, seed, digests, times."""
    return {
        "secateur": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "machine": evaluate.hardware(asked.device),
        "seed": asked.seed,
        "model": {"name": spec_name(asked.model), "kind": loaded.kind, "sha256": loaded.fingerprint},
        "inputs": {**loaded.files, **inputs},
        "seconds": dict(seconds),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_csv(plain: dict[str, list[dict[str, Any]]]) -> str:
    """Measurements by variant, one line each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "name", "value", "unit", "low", "high", "conditions"])
    for variant, found in plain.items():
        for m in found:
            spread = m.get("spread", {})
            said = "; ".join(f"{key}={value}" for key, value in m["conditions"].items())
            writer.writerow(
                [variant, m["name"], m["value"], m["unit"], spread.get("low"), spread.get("high"), said]
            )
    return text.getvalue()


def as_yaml(value: Any) -> str:
    """Plain values as YAML, in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
