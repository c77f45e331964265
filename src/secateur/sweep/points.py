"""A sweep is an experiment and, for some of its settings, lists of values; a point takes one of each.

model: gpt2
data: train.txt
stages:
  - prune: {}
  - fine-tune: {lr: 1e-4}
sweep:
  method: [magnitude, wanda]
  sparsity: [0.3, 0.5]
  epochs: [0, 1]
  seed: [0, 1, 2]
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import UsageError, nearest
from secateur.pipeline.document import Document, Place, read
from secateur.pipeline.spec import Experiment, Pruning, experiment
from secateur.request import build_recipe

__all__ = ["AXES", "Point", "Sweep", "read_sweep", "sweep"]

# axis -> the stage that it is a setting of; None for the experiment itself
AXES: dict[str, str | None] = {
    "method": "prune",
    "sparsity": "prune",
    "pattern": "prune",
    "only": "prune",
    "schedule": "prune",
    "epochs": "fine-tune",
    "seed": None,
}
LARGEST = 10_000  # points


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep.

    Attributes:
        at: axis -> its value here.
        experiment: all that is asked.
    """

    at: Mapping[str, Any]
    experiment: Experiment

    @property
    def name(self) -> str:
        """Of its folder: the values for people, and a digest of all that is asked, so that nothing stale is taken."""
        asked = json.dumps(self.experiment.plain(), sort_keys=True)
        said = "-".join(f"{'s' if axis == 'seed' else ''}{_shown(value)}" for axis, value in self.at.items())
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", said).strip("._")[:80]
        return f"{plain or 'point'}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Sweep:
    """A validated sweep.

    Attributes:
        axes: axis -> its values, in the order of the file.
        points: every combination, the last axis fastest.
    """

    axes: Mapping[str, tuple[Any, ...]]
    points: tuple[Point, ...]


def read_sweep(path: str | Path, more: Mapping[str, Any] | None = None) -> Sweep:
    """A sweep from a YAML file; every error names the line.

    Args:
        path: the file.
        more: settings of the experiment and, under `sweep`, lists that take the place of those in the file.

    Raises:
        UsageError: no plain YAML, an unknown setting or axis, a list with nothing in it or with a value twice, a value
            that the experiment does not take, or a point that cannot be carried out.
        InputError: no text.
    """
    document = read(path)
    value, lines = document.value, document.lines
    if more and isinstance(value, Mapping):
        axes = value.get("sweep") or {}
        value = {**value, **{key: each for key, each in more.items() if key != "sweep"}}
        if isinstance(axes, Mapping):
            value["sweep"] = {**axes, **more.get("sweep", {})}
        given = {("sweep", axis) for axis in more.get("sweep", {})} | {(key,) for key in more if key != "sweep"}
        lines = {place: line for place, line in lines.items() if not any(place[: len(g)] == g for g in given)}
    return sweep(value, Document(value, document.name, lines))


def sweep(given: Any, document: Document | None = None) -> Sweep:
    """Check a sweep given as plain values; see `read_sweep`."""
    at = document or Document(given, "sweep", {})
    if not isinstance(given, Mapping) or not isinstance(given.get("sweep"), Mapping) or not given["sweep"]:
        raise UsageError(
            f"{at.where(('sweep',))}: a sweep is an experiment with a mapping sweep, axis to list, such as "
            f"sweep: {{sparsity: [0.3, 0.5], seed: [0, 1]}}; axes are {', '.join(AXES)}"
        )
    axes = {axis: tuple(values) for axis, values in _axes(given["sweep"], at)}
    number = 1
    for values in axes.values():
        number *= len(values)
    if number > LARGEST:
        raise UsageError(f"{at.where(('sweep',))}: {number:,} points; expected at most {LARGEST:,}")
    stages = _stages(given.get("stages"), axes, at)
    rest = {key: value for key, value in given.items() if key not in ("sweep", "stages")}
    points = []
    for chosen in itertools.product(*(range(len(values)) for values in axes.values())):
        picked = dict(zip(axes, chosen, strict=True))
        points.append(_point(axes, picked, rest, stages, at))
    return Sweep(axes, tuple(points))


def _axes(given: Mapping[str, Any], at: Document) -> Iterator[tuple[str, list[Any]]]:
    for axis, values in given.items():
        place = ("sweep", axis)
        if axis not in AXES:
            raise UsageError(f"{at.where(place)}: {axis} is no axis; {nearest(str(axis), AXES)}")
        listed = values if isinstance(values, list) else [values]
        if not listed:
            raise UsageError(f"{at.where(place)}: {axis} is an empty list; give values, or leave it out")
        seen: set[str] = set()
        for value in listed:
            if _key(value) in seen:
                raise UsageError(f"{at.where(place)}: {axis} has {_shown(value)} twice")
            seen.add(_key(value))
        yield axis, listed


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _stages(given: Any, axes: Mapping[str, Any], at: Document) -> list[dict[str, Any]]:
    """The stages as a list of one-entry mappings; by default those that the axes are settings of."""
    needed = [stage for stage in ("prune", "fine-tune") if stage == "prune" or stage in map(AXES.get, axes)]
    if given is None:
        return [{stage: {}} for stage in needed]
    listed = [{k: v} for k, v in given.items()] if isinstance(given, Mapping) else given
    if not isinstance(listed, list):
        raise UsageError(f"{at.where(('stages',))}: stages is {given!r}; expected a list")
    stages = [{each: {}} if isinstance(each, str) else each for each in listed]
    names = [name for stage in stages if isinstance(stage, Mapping) for name in stage]
    for axis in axes:
        stage = AXES[axis]
        if stage is not None and names.count(stage) != 1:
            raise UsageError(
                f"{at.where(('sweep', axis))}: {axis} is a setting of a stage {stage}, and there are "
                f"{names.count(stage)}; give one"
            )
    for axis in axes:
        for number, stage in enumerate(stages):
            inside = stage.get(AXES[axis] or "") if isinstance(stage, Mapping) else None
            if isinstance(inside, Mapping) and axis in inside:
                where = at.where(("stages", number, AXES[axis] or "", axis))
                raise UsageError(f"{where}: {axis} is swept over; leave it out here")
    return stages


def _point(
    axes: Mapping[str, tuple[Any, ...]],
    picked: Mapping[str, int],
    rest: Mapping[str, Any],
    stages: list[dict[str, Any]],
    at: Document,
) -> Point:
    here = {axis: axes[axis][number] for axis, number in picked.items()}
    asked, todo = dict(rest), copy.deepcopy(stages)
    lines: dict[Place, int] = dict(at.lines)
    for axis, value in here.items():
        home, place = _home(axis, todo)
        if axis == "epochs" and value == 0:
            todo = [stage for stage in todo if "fine-tune" not in stage]
            continue
        if (axis, value) in (("only", "all"), ("schedule", "once")):
            continue
        (asked if home is None else home)[axis] = value
        line = at.lines.get(("sweep", axis, picked[axis]), at.lines.get(("sweep", axis), 0))
        lines[(*place, axis)] = line
    if not todo:
        raise UsageError(f"{at.where(('sweep', 'epochs'))}: with 0 epochs no stage is left")
    document = _Told(None, at.name, lines)
    found = experiment({**asked, "stages": todo}, document)
    for number, stage in enumerate(found.stages):
        if isinstance(stage.settings, Pruning):
            _check_recipe(stage.settings, document, number, here)
    return Point(here, found)


class _Told(Document):
    """Where a setting of a point stands; what stands on line 0 is on the command line."""

    def where(self, place: Place) -> str:
        """See `Document`."""
        return "command line" if self.lines.get(place) == 0 else super().where(place)


def _home(axis: str, todo: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, Place]:
    """The settings that an axis belongs to, and their place; those of the experiment are None."""
    stage = AXES[axis]
    for number, each in enumerate(todo):
        if stage is not None and isinstance(each, Mapping) and stage in each:
            each[stage] = dict(each[stage] or {})
            return each[stage], ("stages", number, stage)
    return None, ()


def _check_recipe(settings: Pruning, at: Document, number: int, here: Mapping[str, Any]) -> None:
    """What does not fit together is told before anything is run."""
    try:
        build_recipe(settings.asked)
    except UsageError as error:
        places = [("stages", number, "prune", axis) for axis in ("pattern", "method", "sparsity")]
        place = next((p for p in places if p in at.lines), ("stages", number))
        said = ", ".join(f"{axis} {_shown(value)}" for axis, value in here.items())
        raise UsageError(f"{at.where(place)}: {said}: {error}") from None


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
