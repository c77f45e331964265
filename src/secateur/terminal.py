"""What the command line shows: progress with time left, tables of measurements and layers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from secateur.core.counts import sparsity
from secateur.core.where import layers, select
from secateur.evaluate import Measurement
from secateur.measure import Tell

__all__ = ["progress", "show_layers", "show_measurements"]

PATIENCE = 2.0  # seconds before a task is worth a bar
EVERY = 30.0  # seconds between two lines where there is no terminal to draw a bar on


class _Bars(Progress):
    """Bars of the tasks that have taken longer than our patience, drawn by rich's own clock."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The table of bars, or nothing."""
        late = [task for task in self.tasks if (task.elapsed or 0) > PATIENCE]
        if late:
            yield self.make_tasks_table(late)


@contextmanager
def progress(console: Console | None = None) -> Iterator[Tell]:
    """A function `(label, done, total)`; a task longer than two seconds gets a bar with the time left.

    A task of a single step gets its time so far. On something that is no terminal, such a task gets a line after
    two seconds, one every half a minute, and one when it ends. All of it goes to the standard error.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    # what the program prints goes where it belongs, not through the bars to the standard error
    options: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False, "transient": True}
    bars = _Bars(*columns, *times, console=console, disable=not console.is_terminal, **options)
    tasks: dict[str, _Task] = {}

    def tell(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = _Task(bars.add_task(label, total=total if total > 1 else None), time.perf_counter())
        task = tasks[label]
        bars.update(task.number, completed=done)
        if not console.is_terminal:
            task.write(console, label, done, total)
        if done >= total:
            bars.remove_task(tasks.pop(label).number)

    with bars:
        yield tell


@dataclass
class _Task:
    """One task under way; `write` says in lines how it gets on."""

    number: TaskID
    began: float
    said: float | None = None

    def write(self, console: Console, label: str, done: int, total: int) -> None:
        now = time.perf_counter()
        spent = now - self.began
        if spent <= PATIENCE:
            return
        if done >= total:
            console.print(Text(f"{label}: {spent:.0f} s"))
        elif self.said is None or now - self.said >= EVERY:
            self.said = now
            left = f", {spent / done * (total - done):.0f} s left" if done else ""
            console.print(Text(f"{label}: {done} of {total}{left}"))


def show_measurements(measurements: Mapping[str, Sequence[Measurement]]) -> None:
    """One row a quantity, one column a variant; conditions below the table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measurement")
    for variant in measurements:
        table.add_column(Text(variant), justify="right")
    names = dict.fromkeys((m.name, m.unit) for found in measurements.values() for m in found)
    for name, unit in names:
        cells = []
        for found in measurements.values():
            held = [m for m in found if m.name == name]
            cells.append(Text(_value(held[0]) if held else ""))
        label = name.replace("_", " ") + ("" if unit == "1" else f" ({unit})")
        table.add_row(Text(label), *cells)
    Console(highlight=False, width=None).print(table)
    told = dict.fromkeys(
        str(m.conditions.get("protocol") or "") for found in measurements.values() for m in found
    )
    datasets = dict.fromkeys(
        str(m.conditions.get("dataset") or "") for found in measurements.values() for m in found
    )
    inputs = dict.fromkeys(
        str(m.conditions.get("input") or "") for found in measurements.values() for m in found
    )
    of_inputs = [f"an input of {shape}: macs, latency" for shape in inputs if shape]
    for text in [*told, *(f"data: {name}" for name in datasets if name), *of_inputs]:
        if text:
            typer.echo(f"  {text}")


def _value(measured: Measurement) -> str:
    value = f"{measured.value:,}" if isinstance(measured.value, int) else f"{measured.value:,.4g}"
    if measured.spread is not None:
        value += f"  [{measured.spread.low:.3g} to {measured.spread.high:.3g}]"
    return value


def show_layers(model: Any, only: Sequence[str], skip: Sequence[str], *, as_json: bool = False) -> None:
    """Every matrix of a model with role, shape, zeros, ties and whether it would be pruned."""
    selection = select(model, list(only) or None, list(skip) or None)
    chosen = {layer.name for layer in selection.chosen}
    reasons = {layer.name: reason for layer, reason in selection.left_out}
    counts = sparsity(model)
    rows: list[dict[str, Any]] = [
        {
            "name": layer.name,
            "role": layer.role,
            "stack": layer.stack or "",
            "shape": list(layer.weight.shape),
            "zeros": counts.layers[layer.name].zeros,
            "pruned": layer.name in chosen,
            "why not": reasons.get(layer.name, ""),
            "tied to": list(layer.tied),
        }
        for layer in layers(model)
    ]
    if as_json:
        typer.echo(
            json.dumps(
                {"layers": rows, "parameters": counts.model.size, "unprunable": dict(selection.unprunable)}
            )
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "role", "shape", "zeros", "chosen"):
        table.add_column(column, justify="right" if column in ("shape", "zeros") else "left", overflow="fold")
    for row in rows:
        shape = " x ".join(str(size) for size in row["shape"])
        table.add_row(
            Text(row["name"]), row["role"], shape, f"{row['zeros']:,}", "yes" if row["pruned"] else "no"
        )
    Console(highlight=False).print(table)
    for name, reason in (*reasons.items(), *selection.unprunable):
        typer.echo(f"left out {name}: {reason}")
    typer.echo(
        f"{counts.prunable.size:,} prunable of {counts.model.size:,} parameters, {counts.model.zeros:,} are zero"
    )
