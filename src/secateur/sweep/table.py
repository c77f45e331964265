"""The table of a sweep, read from the folders of its points: what is there counts, however and whenever it came."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import InputError, UsageError
from secateur.evaluate import Measurement
from secateur.folder import is_run_folder, write_text
from secateur.sweep.points import Sweep
from secateur.sweep.work import failure_of, folder_of

__all__ = ["Group", "Line", "groups", "lines", "write_table"]

TIMED = ("latency", "speedup", "throughput", "peak_memory")  # never the same twice


@dataclass(frozen=True)
class Line:
    """One point.

    Attributes:
        at: axis -> its value.
        status: done, failed or waiting.
        found: name -> what was measured after the last stage.
        dense: the same right before the first pruning.
        error: why it failed.
        folder: its name below `points`.
    """

    at: Mapping[str, Any]
    status: str
    folder: str
    found: Mapping[str, Measurement] = field(default_factory=dict)
    dense: Mapping[str, Measurement] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Group:
    """Points that differ in their seeds alone: each measurement's mean, least and largest value.

    Attributes:
        at: axis -> value, without the seed.
        values: name -> values, one a seed that is done.
    """

    at: Mapping[str, Any]
    values: Mapping[str, Sequence[float]]

    def mean(self, name: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.values[name])

    def std(self, name: str) -> float | None:
        """Sample standard deviation over seeds; None of one."""
        values = self.values[name]
        return statistics.stdev(values) if len(values) > 1 else None


def lines(sweep: Sweep, out: Path) -> list[Line]:
    """Every point of a sweep as its folder tells it.

    Raises:
        InputError: a finished folder whose results cannot be read.
    """
    return [_line(point, out) for point in sweep.points]


def _line(point: Any, out: Path) -> Line:
    folder = folder_of(out, point)
    if is_run_folder(folder):
        path = folder / "run" / "results.json"
        try:
            stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
            first = next((at for at, stage in enumerate(stages) if stage["name"] == "prune"), 1)
            dense, found = (
                {m["name"]: Measurement.from_dict(m) for m in stage["measurements"]}
                for stage in (stages[first - 1], stages[-1])
            )
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); remove the folder to do it again") from None
        return Line(point.at, "done", point.name, found, dense)
    failure = failure_of(out, point)
    if failure.is_file():
        try:
            said = str(json.loads(failure.read_text(encoding="utf-8"))["error"])
        except (OSError, ValueError, KeyError, TypeError):
            said = "the file that says why cannot be read"
        return Line(point.at, "failed", point.name, error=said)
    return Line(point.at, "waiting", point.name)


def measured(found: Sequence[Line]) -> list[str]:
    """Names of measurements of all points, in the order of the first that has them, without times."""
    names = (m.name for line in found for m in line.found.values())
    return [name for name in dict.fromkeys(names) if name not in TIMED]


def columns(sweep: Sweep, found: Sequence[Line]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table; no time in it, so that the same sweep gives the same table."""
    names = measured(found)
    shown = [
        f"{name} reached" if name in sweep.axes else name for name in names
    ]  # asked and measured: two columns
    head = [*sweep.axes, "status", *shown, "error", "folder"]
    rows = [
        [
            *(_cell(line.at[axis]) for axis in sweep.axes),
            line.status,
            *(line.found[name].value if name in line.found else None for name in names),
            line.error or None,
            line.folder,
        ]
        for line in found
    ]
    return head, rows


def _cell(value: Any) -> Any:
    return "+".join(map(str, value)) if isinstance(value, list) else value


def write_table(sweep: Sweep, found: Sequence[Line], out: Path, *, parquet: bool = False) -> None:
    """Write results.csv and, with `parquet`, results.parquet.

    Raises:
        UsageError: Parquet without pyarrow.
    """
    head, rows = columns(sweep, found)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(out / "results.csv", text.getvalue())
    if parquet:
        pyarrow, writer = need_parquet()
        held = {name: _one_type([row[at] for row in rows]) for at, name in enumerate(head)}
        beside = out / ".results.parquet.tmp"
        writer.write_table(pyarrow.table(held), beside)
        beside.replace(out / "results.parquet")


def need_parquet() -> tuple[Any, Any]:
    """pyarrow and its module for Parquet, or an error that names the extra."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("--parquet needs the extra parquet: pip install 'secateur[parquet]'") from error
    return pyarrow, parquet


def _one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return [None if value is None else float(value) for value in values]
    return values if len(kinds) < 2 else [None if value is None else str(value) for value in values]


def groups(sweep: Sweep, found: Sequence[Line]) -> list[Group]:
    """Points that are done, those that differ in the seed alone together."""
    axes = [axis for axis in sweep.axes if axis != "seed"]
    names = measured(found)
    held: dict[str, tuple[dict[str, Any], list[Line]]] = {}
    for line in found:
        if line.status == "done":
            at = {axis: _cell(line.at[axis]) for axis in axes}
            held.setdefault(json.dumps(at), (at, []))[1].append(line)
    return [
        Group(
            at,
            {n: [line.found[n].value for line in same] for n in names if all(n in line.found for line in same)},
        )
        for at, same in held.values()
    ]
