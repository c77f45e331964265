"""The whole job: load, say what will be done, measure, prune, measure again, save, report.

A run's folder holds a checkpoint that plain `from_pretrained` loads, and under `run/` everything that says
how it came to be: masks, measurements, the request with every default, versions, the report. It is written
beside its place and renamed at the end, so a folder that is there is finished.
"""

from __future__ import annotations

import copy
import csv
import io
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from secateur import __version__, evaluate, report
from secateur import model as models
from secateur.card import model_card
from secateur.core.counts import Sparsity, sparsity
from secateur.core.masks import Masks
from secateur.core.statistics import STATISTICS
from secateur.evaluate import Measurement
from secateur.folder import new_folder, write_json, write_text
from secateur.measure import Tell, Yardstick, compare_speed, measure, same_predictions
from secateur.prune import Plan, plan, prune_
from secateur.request import PruneRequest, build_recipe, spec_name
from secateur.sources import sources

__all__ = ["Result", "Run", "prepare", "prune_to"]


def left_out_by_reason(todo: Plan, shown: int = 3) -> list[str]:
    """One line a reason: the layers it leaves out, the first few by name."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in todo.left_out:
        by_reason.setdefault(reason, []).append(layer.name)
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        lines.append(f"{', '.join(names[:shown])}{more}: {reason}")
    return lines


def _silent(label: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Run:
    """Everything that is decided before a weight is touched.

    Attributes:
        asked: the request.
        loaded: the model and where it came from.
        plan: what would be pruned.
        calibration: batches for the statistics, None where the score needs none.
        by: what the model is judged by.
        notes: sentences that a reader of the results needs.
    """

    asked: PruneRequest
    loaded: models.Loaded
    plan: Plan
    calibration: Sequence[Any] | None
    by: Yardstick
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"model    {self.loaded.spec}", f"prune    {self.plan}"]
        if self.calibration is not None:
            lines.append(
                f"data     {len(self.calibration)} calibration batches from {self.asked.data or 'the model itself'}"
            )
        judged = [name for name in (self.by.text_name, self.by.labelled_name) if name]
        if judged:
            lines.append(f"judge    {', '.join(judged)}")
        lines += [f"leave    {line}" for line in left_out_by_reason(self.plan)]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


@dataclass(frozen=True)
class Result:
    """What a run found: measurements by variant (`dense`, `pruned`), masks, and the seconds of each step."""

    measurements: dict[str, list[Measurement]]
    masks: Masks
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(
    asked: PruneRequest,
    *,
    offline: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tell: Tell = _silent,
) -> Run:
    """Load the model and the data, and decide what will be done; nothing is changed or written.

    Raises:
        UsageError, InputError: whatever is wrong with the request, the model or the data.
    """
    recipe = build_recipe(asked)
    tell("loading the model", 0, 1)
    loaded = models.load(
        asked.model,
        dtype=asked.dtype,
        device=asked.device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        seed=asked.seed,
    )
    tell("loading the model", 1, 1)
    todo = plan(
        loaded.model,
        asked.sparsity,
        recipe,
        nonzero=asked.nonzero,
        only=list(asked.only) or None,
        skip=list(asked.skip) or None,
    )
    needs_data = any(name in STATISTICS for name in todo.statistics)
    given = sources(asked, loaded, needs_data=needs_data, tell=tell)
    return Run(asked, loaded, todo, given.calibration, given.by, given.notes)


def prune_to(run: Run, out: str | Path, *, if_exists: str = "fail", tell: Tell = _silent) -> Result:
    """Carry a prepared run out and write its folder.

    Args:
        run: what `prepare` returned; its model is pruned in place.
        out: the run's folder.
        if_exists: "fail" or "overwrite", see `folder.new_folder`.
        tell: progress.

    Cost: three evaluations, one calibration pass, and a second copy of the model to compare with.
    """
    with new_folder(out, if_exists) as folder:
        (folder / "run").mkdir()
        result, stages = _prune(run, tell)
        _write(run, result, stages, folder)
    return result


def _prune(run: Run, tell: Tell) -> tuple[Result, list[report.Stage]]:
    model, asked = run.loaded.model, run.asked
    seconds: dict[str, float] = {}
    dense = copy.deepcopy(model)
    stages = [_stage("before", model, run.plan)]
    with _timed(seconds, "measure dense"):
        found = {"dense": measure(model, run.by)}
    with _timed(seconds, "prune"):
        masks = prune_(
            model,
            asked.sparsity,
            run.plan.recipe,
            nonzero=asked.nonzero,
            data=_counted(run.calibration, tell),
            only=list(asked.only) or None,
            skip=list(asked.skip) or None,
            seed=asked.seed,
        )
    stages.append(_stage("after", model, run.plan))
    with _timed(seconds, "measure pruned"):
        found["pruned"] = measure(model, run.by) + same_predictions(model, dense, run.by)
    with _timed(seconds, "latency"):
        for name, speed in compare_speed({"dense": dense, "pruned": model}, run.by).items():
            found[name] += speed
    return Result(found, masks, seconds), stages


def _counted(batches: Sequence[Any] | None, tell: Tell) -> Iterator[Any] | None:
    if batches is None:
        return None

    def run() -> Iterator[Any]:
        for done, batch in enumerate(batches):
            tell("calibration", done, len(batches))
            yield batch
        tell("calibration", len(batches), len(batches))

    return run()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


def _stage(name: str, model: torch.nn.Module, todo: Plan) -> report.Stage:
    return report.Stage(
        name, {layer.name: report.histogram(layer.weight, name=layer.name) for layer in todo.layers}
    )


def _write(run: Run, result: Result, stages: list[report.Stage], folder: Path) -> None:
    """Every file of the run's folder; the manifest is the folder's own business."""
    loaded, counted = run.loaded, sparsity(run.loaded.model)
    models.save(loaded.model, loaded.tokenizer, folder, source=loaded.folder, dtype=_stored(run))
    for name in result.measurements:
        if name == "pruned":
            result.measurements[name].append(evaluate.disk_bytes(folder, "*.safetensors"))
        elif loaded.folder is not None:
            result.measurements[name].append(evaluate.disk_bytes(loaded.folder, "*.safetensors"))
    result.masks.save(folder / "run" / "masks.safetensors")
    plain = {name: [m.to_dict() for m in found] for name, found in result.measurements.items()}
    write_json(folder / "run" / "metrics.json", plain)
    write_text(folder / "run" / "results.csv", _csv(plain))
    write_json(folder / "run" / "layers.json", _layers(run, result.masks, counted))
    write_text(folder / "run" / "recipe.yaml", _yaml(run.asked.model_dump(mode="json", exclude_unset=True)))
    write_text(folder / "run" / "recipe.resolved.yaml", _yaml(_resolved(run)))
    write_json(folder / "run" / "run.json", _circumstances(run, result))
    write_text(folder / "README.md", model_card(run.asked, str(run.plan), result.measurements, result.masks))
    html = report.page(
        spec_name(loaded.spec),
        summary=_sentence(run, result.masks),
        measurements=plain,
        layers=_rows(run, counted),
        stages=stages,
        notes=[*run.notes, *(f"Left as they are: {line}." for line in left_out_by_reason(run.plan))],
    )
    report.write(folder / "run" / "report.html", html)


def _stored(run: Run) -> Any:
    """Weights go back in the type their files had, where masks and zeros survive any type."""
    return run.loaded.stored_dtype if run.loaded.kind == "transformers" else None


def _sentence(run: Run, masks: Masks) -> str:
    recipe = run.plan.recipe
    return (
        f"{masks.zeros:,} of {masks.size:,} weights in {len(masks)} layers of {spec_name(run.loaded.spec)} were set to "
        f"zero by {run.asked.method} ({recipe}): sparsity {masks.sparsity:.4f} of these layers."
    )


def _rows(run: Run, counted: Sparsity) -> list[report.LayerRow]:
    rows = []
    for layer in run.plan.layers:
        count = counted.layers[layer.name]
        rows.append(report.LayerRow(layer.name, tuple(layer.weight.shape), layer.role, count.size, count.zeros))
    return rows


def _layers(run: Run, masks: Masks, counted: Sparsity) -> list[dict[str, Any]]:
    chosen = [
        {
            "name": layer.name,
            "role": layer.role,
            "shape": list(layer.weight.shape),
            "weights": layer.size,
            "pruned": layer.size - int(torch.count_nonzero(masks[layer.name])),
            "zeros": counted.layers[layer.name].zeros,
        }
        for layer in run.plan.layers
    ]
    left = [{"name": layer.name, "role": layer.role, "left out": reason} for layer, reason in run.plan.left_out]
    return [*chosen, *left]


def _resolved(run: Run) -> dict[str, Any]:
    """The request with every default, and what it resolved to."""
    settings = run.asked.model_dump(mode="json")
    settings["resolved"] = {
        **run.plan.recipe.describe(),
        "layers": [layer.name for layer in run.plan.layers],
        "weights": run.plan.size,
        "weights kept": run.plan.keep,
        "statistics": list(run.plan.statistics),
    }
    return settings


def _circumstances(run: Run, result: Result) -> dict[str, Any]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "plotly", "pydantic")
    return {
        "secateur": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "machine": evaluate.hardware(run.asked.device),
        "seed": run.asked.seed,
        "model": {
            "name": spec_name(run.loaded.spec),
            "kind": run.loaded.kind,
            "sha256": run.loaded.fingerprint,
        },
        "inputs": dict(run.loaded.files),
        "seconds": result.seconds,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _csv(plain: dict[str, list[dict[str, Any]]]) -> str:
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


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
